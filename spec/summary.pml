/* The summary of a bitmap (src/pagecore/_keeper.h): which lines of its words hold set bits. Three pages in two lines
 * of one summary word; two writers, cleaners of which one gets its turn, and a scan that begins at any time.
 *
 * Of memory order it has the one thing that the protocol rests on: without a fence, a load that stands behind a locked
 * operation on another word may happen before it (AArch64; the store of an exchange is seen later than the loads
 * behind it). Everything else is sequentially consistent. A step touches one word that others use, once. */

#ifndef WRITERS
#define WRITERS 2
#endif
#ifndef CLEANERS
#define CLEANERS 1
#endif

byte bits;              /* pages: 1 and 2 in the first line, 4 in the second            */
byte summary;           /* lines: 1, 2                                                  */
byte generation;        /* odd while a cleaner is at work                               */

/* What a scan has to find: what was set by a call that has returned, and that nobody took. */
byte under_way[2];
byte returned;
byte must;
byte done;

#define PAGES_OF(lines) (((lines) & 1 -> 3 : 0) | ((lines) & 2 -> 4 : 0))
#define LINES_OF(pages) (((pages) & 3 -> 1 : 0) | ((pages) & 4 -> 2 : 0))

inline take(lines)
{
    under_way[0] = under_way[0] & ~PAGES_OF(lines);
    under_way[1] = under_way[1] & ~PAGES_OF(lines);
    returned = returned & ~PAGES_OF(lines);
    must = must & ~PAGES_OF(lines);
    printf("takes %d\n", bits & PAGES_OF(lines));
    bits = bits & ~PAGES_OF(lines)
}

inline set_page(page)
{
#ifdef MUTANT_ONLY_NEW
    to_mark = to_mark | LINES_OF((page) & ~bits);
#else
    to_mark = to_mark | LINES_OF(page);
#endif
    bits = bits | (page);
    under_way[_pid] = under_way[_pid] | (page);
    printf("sets %d\n", page)
}

/* Mark a line if it was not marked when it was looked at. */
inline mark_line(line)
{
    if
    :: atomic { to_mark & line ->
#if defined(MUTANT_MARKS_FIRST)
        skip
#elif defined(MUTANT_WRITER_FENCE)
        if
        :: marks = summary
        :: skip                 /* it came before the bit */
        fi
#else
        marks = summary
#endif
        };
        if
        :: atomic { !(marks & line) -> summary = summary | line; printf("marks %d\n", line) }
        :: else
        fi
    :: else
    fi
}

active [WRITERS] proctype Writer()
{
    byte pages, marks, to_mark;
    /* One page, or a batch with pages of both lines. */
    if
    :: pages = 1
    :: _pid == 0 -> pages = 5
    :: _pid == 1 -> pages = 2
    :: _pid == 1 -> pages = 4
    fi;
    if
    :: atomic {                 /* in a memory transaction */
        set_page(pages);
        summary = summary | LINES_OF(pages);
        printf("and marks, all at once\n") }
    :: atomic {
#if defined(MUTANT_MARKS_FIRST) || defined(MUTANT_WRITER_FENCE)
        marks = summary;
#endif
        skip };
        if
        :: pages & 3 -> atomic { set_page(pages & 3) }
        :: else
        fi;
        if
        :: pages & 4 -> atomic { set_page(pages & 4) }
        :: else
        fi;
        /* fence */
        mark_line(1);
        mark_line(2)
    fi;
    atomic { returned = returned | under_way[_pid]; under_way[_pid] = 0; marks = 0; to_mark = 0; pages = 0; done++;
        printf("returns\n") }
}

inline look_at_line(line)
{
    if
    :: atomic { marks & line ->
#ifdef MUTANT_CLEANER_FENCE
        if
        :: seen = bits
        :: skip                 /* it came before the marks were taken */
        fi
#else
        seen = bits
#endif
        };
        if
        :: atomic { drains && seen & PAGES_OF(line) -> take(line) }
        :: !drains && seen & PAGES_OF(line) -> again = again | line
        :: else
        fi
    :: else
    fi
}

/* A drain takes the bits of the lines whose marks it took; a mere cleaner puts back the marks of those that hold some.
 * Beside another cleaner, a drain looks at all lines and leaves the marks alone; a mere cleaner leaves all of it. */
active [CLEANERS] proctype Cleaner()
{
    byte marks, again, seen;
    bit drains, cleans;
    if
    :: drains = 1
    :: drains = 0
    fi;
#ifdef MUTANT_ODD
    cleans = 1;
#elif defined(MUTANT_ONE_CLEANER)
    atomic { cleans = 1; generation++ };
#else
    atomic {                    /* one compare-and-exchange */
        if
        :: !(generation & 1) -> cleans = 1; generation++
        :: else
        fi };
#endif
    if
    :: cleans || drains ->
#ifdef MUTANT_CLEANER_FENCE
        seen = bits;
#endif
#ifdef MUTANT_TAKE_FIRST
        marks = (cleans -> summary : 3);
#else
        if
        :: atomic { cleans -> marks = summary; summary = 0; printf("takes the marks %d\n", marks) }
        :: else -> marks = 3
        fi;
#endif
        /* fence */
        look_at_line(1);
        look_at_line(2);
#ifdef MUTANT_TAKE_FIRST
        if
        :: atomic { cleans -> summary = 0; printf("takes the marks %d\n", marks) }
        :: else
        fi;
#endif
        if
        :: atomic { cleans && again -> summary = summary | again; printf("puts back the marks %d\n", again) }
        :: else
        fi;
        if
#ifdef MUTANT_ODD
        :: cleans -> generation = generation + 2
#else
        :: cleans -> generation++
#endif
        :: else
        fi
    :: else
    fi;
    atomic { marks = 0; again = 0; seen = 0; drains = 0; cleans = 0; done++ }
}

inline read_line(line)
{
    if
    :: marks & line -> found = found | (bits & PAGES_OF(line))
    :: else
    fi
}

/* From its own generation to the next look at it, what is not marked holds nothing. */
active proctype Reader()
{
    byte before, marks, found;
    atomic { must = returned; before = generation; printf("begins a scan for %d\n", must) };
    if
    :: before & 1 -> marks = 3
    :: else ->
        marks = summary;
        read_line(1);
        read_line(2);
#ifdef MUTANT_RECHECK
        marks = 0
#else
        marks = (generation == before -> 0 : 3)
#endif
    fi;
    /* All lines, where the marks were not to be trusted. */
    read_line(1);
    read_line(2);
    atomic { printf("found %d, looked for %d\n", found, must); assert(!(must & ~found)); must = 0 };
    atomic { before = 0; marks = 0; found = 0; done++ }
}

active proctype Quiet()
{
    done == WRITERS + CLEANERS + 1;
    assert(!(bits & ~PAGES_OF(summary)))
}
