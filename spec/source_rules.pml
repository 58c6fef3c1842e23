/* The source's planes (design section 3) of one page, and the steps of each rule on them. Included by the models.
 *
 * A step that the code does in one atomic instruction, or under one lock, is one step here; whatever lies between
 * two of them, other processes may do. */

bit dirty = 1;          /* the source owes the page                                    */
bit hinted;             /* the guest said that it is free; dirty beside it wins        */

/* What became of a page that the destination asked for (S7). */
#define OWED 1
#define FREE 2
#define SENT 3

/* S1: one read-modify-write clears dirty and says who sends the page; hinted is not a taker's to touch (S3). */
inline take(got)
{
    d_step {
        got = dirty; dirty = 0;
#ifdef MUTANT_TAKER_CLEARS
        hinted = 0;
#endif
    }
}

/* S1, S12: a send that failed only sets dirty; a hint that came meanwhile stays known. */
inline put_back()
{
    dirty = 1
}

/* S2: set dirty, then clear hinted. */
inline publish(bits)
{
    if
    :: bits -> dirty = 1; hinted = 0
    :: else
    fi
}

/* S3, for a page that was dirty: set hinted, then fetch and clear dirty, then undo where a sender was faster. */
inline hint_page(before, fetched)
{
    if
    :: dirty ->
        before = hinted;
#ifdef MUTANT_HINTED_PLANE
        /* Today's QEMU: a hint makes the page clean, and nothing remembers why. */
        d_step { fetched = dirty; dirty = 0 }
#else
        hinted = 1;
        d_step { fetched = dirty; dirty = 0 };
        if
        :: !before && !fetched -> hinted = 0
        :: else
        fi
#endif
    :: else
    fi
}

/* S7: what the page is, and from here on it is sent. Under the tracker's lock. */
inline resolve(kind)
{
    d_step {
        if
        :: dirty -> kind = OWED
        :: !dirty && hinted -> kind = FREE
        :: else -> kind = SENT
        fi;
        dirty = 0;
        hinted = 0
    }
}

/* S8: when the lists are computed, what is owed is not free any more. */
inline settle_owed()
{
    if
#ifndef MUTANT_SETTLE_OWED
    :: dirty -> hinted = 0
#endif
    :: else
    fi
}

/* S9, before a list was applied: nothing is known about versions, so hinted pages are owed, too. */
inline owe_all()
{
    dirty = 1;
#ifndef MUTANT_OWE_HINTED
    hinted = 0
#else
    if
    :: hinted -> dirty = 0
    :: else
    fi
#endif
}

/* S9, after it: what the destination reports as settled is the truth. */
inline reload(settled)
{
    d_step {
        hinted = hinted && !dirty && !settled;
        dirty = !settled && !hinted
    }
}
