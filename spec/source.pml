/* The source before and at the switch: guest, VMM, dirty log, sync, hints and a sender beside one another (S1 to S4,
 * S8, S11, S12). The link is one ordered stream, and what is sent arrives: rounds.pml treats more of them.
 *
 * One of three dirty logs:
 *   LOG_ONE_STEP   fetching re-arms (legacy KVM log, PAGEMAP_SCAN): promise "armed"
 *   LOG_TWO_STEP   fetch, then re-arm (dirty ring): promise "armed"
 *   LOG_LAZY       re-armed page by page, when a page is sent or hinted (manual protect): promise "held"
 */

#include "source_rules.pml"

#if !defined(LOG_ONE_STEP) && !defined(LOG_TWO_STEP) && !defined(LOG_LAZY)
#define LOG_ONE_STEP
#endif

#ifndef ROUNDS
#define ROUNDS 2        /* hint epochs, each with a sync after it                       */
#endif
#ifndef WRITES
#define WRITES 2
#endif
#define FREES  1
#define HINTS  1
#ifdef LOG_LAZY
#define DMAS   0        /* the VMM's writes are independent of the log: the other two runs have them */
#else
#ifndef DMAS
#define DMAS   1
#endif
#endif

bit side;               /* S12: written by the VMM, and marked                          */
bit logged;             /* the dirty log has a write to report                          */
bit armed = 1;          /* the next write makes the log report again                    */
bit seen;               /* S11: the log reported it, and was not told CLEAR since       */

byte smem = 1;          /* the page's content at the source: a version                  */
byte dmem;              /* its newest copy at the destination                           */
bit allocated = 1;      /* the guest holds the page                                     */
bit cares = 1;          /* its content is defined: it was written since it was freed    */
bit held;               /* promise "held": hinted, and kept by the guest until DONE     */

byte epoch;             /* the open hint epoch; 0: none                                 */
byte last_epoch;
byte told;              /* the epoch that the guest was told of                         */
bit done;               /* the session has ended                                        */

bit stopped;            /* the guest is stopped                                         */
bit dma;                /* the VMM is between its write and its mark                    */
bit sending;            /* a sender holds a page that it took                           */
bit quiet;              /* no sender takes any more                                     */
bit kept, filled;       /* by the lists, the destination keeps the page, or fills it    */

bit lock;               /* the tracker's lock: sync, hints, lists                       */
bit chunk;              /* S11: CLEAR of a chunk is under way; drains and hints wait    */

chan hints = [1] of { byte };

#define acquire(l) atomic { !l -> l = 1 }
#define release(l) l = 0

#ifdef LOG_ONE_STEP
#define log_write()  logged = 1
#else
#define log_write()  if :: armed -> logged = 1; armed = 0 :: else fi
#endif

/* S11: CLEAR what was seen set, each sighting once, while the page is still dirty with us: it drops what the
 * log has to report, so anything else would drop a write that nobody has fetched. */
inline clear_log()
{
    if
#ifdef MUTANT_CLEAR_UNSEEN
    :: 1 ->
#else
    :: seen && dirty ->
#endif
        d_step { logged = 0; armed = 1; seen = 0 }
    :: else
    fi
}

active proctype Guest()
{
    byte writes, frees, reports;
    do
    :: atomic { !stopped && !held && writes < WRITES ->
        writes++; smem++; cares = 1; allocated = 1; log_write(); printf("guest writes version %d\n", smem) }
    :: atomic { !stopped && allocated && !dma && frees < FREES ->
        frees++; allocated = 0; cares = 0; printf("guest frees\n") }
    :: atomic { !stopped && !allocated && !held && told && reports < HINTS ->
        reports++; hints!told; printf("guest hints under epoch %d\n", told);
#if defined(LOG_LAZY) && !defined(MUTANT_PROMISE)
        held = 1
#endif
        }
    :: atomic { !stopped && !allocated && !held ->
        allocated = 1; printf("guest allocates, and writes nothing yet\n") }
    :: atomic { stopped -> break }
    od
}

/* A writer that no log sees (S12). */
active proctype Vmm()
{
    byte n;
    do
    :: atomic { !stopped && allocated && n < DMAS ->
        n++; dma = 1; smem++; cares = 1; printf("VMM writes version %d\n", smem) };
#ifndef MUTANT_MARK
#ifdef MUTANT_SIDE_PLANE
        atomic { dirty = 1; dma = 0; printf("VMM marks in the dirty plane alone\n") }
#else
        if
        :: dirty = 1        /* it may also set dirty */
        :: skip
        fi;
        atomic { side = 1; dma = 0; printf("VMM marks\n") }
#endif
#else
        dma = 0
#endif
    :: atomic { stopped -> break }
    od
}

active proctype Hinter()
{
    byte given;
    bit before, fetched;
end:
    do
    :: hints?given ->
        acquire(lock);
        /* S4: the look at the epoch and the clearing are one step against a sync. */
        if
#ifdef MUTANT_EPOCHS
        :: 1 ->
#else
        :: given == epoch ->
#endif
            printf("hint of epoch %d is processed\n", given);
#ifdef LOG_LAZY
            acquire(chunk);
            /* S3: a lazy log is re-armed at the hint, before dirty is cleared. */
            clear_log();
#endif
            hint_page(before, fetched);
#ifdef LOG_LAZY
            release(chunk);
#endif
        :: else
        fi;
        release(lock)
    od
}

active proctype Sender()
{
    byte version;
    bit got;
end:
    do
    :: atomic { dirty && !quiet -> sending = 1 };
#ifdef LOG_LAZY
        acquire(chunk);
        clear_log();        /* S1: re-arm where the sync did not */
#endif
#ifdef MUTANT_READ_FIRST
        version = smem;
        take(got);
#else
        take(got);
#endif
#ifdef LOG_LAZY
        release(chunk);
#endif
        if
        :: got ->
#ifndef MUTANT_READ_FIRST
            version = smem;
#endif
            if
            :: atomic { dmem = version; printf("version %d is sent\n", version) }
            :: put_back(); printf("the send fails, put back\n")
            fi
        :: else
        fi;
        sending = 0
    od
}

#ifdef LOG_LAZY
/* A neighbour in the same 64 pages is sent: the aligned CLEAR covers this page, too. */
active proctype Neighbour()
{
    byte n;
end:
    do
    :: n < 1 ->
        n++;
        acquire(chunk);
        clear_log();
        release(chunk)
    od
}
#endif

/* S2. */
inline sync()
{
    acquire(lock);
    epoch = 0;                              /* S4: a sync ends the epoch */
    d_step { fetched = logged;
#ifdef LOG_LAZY
             seen = seen | logged           /* KVM keeps the bit until CLEAR */
#else
             logged = 0
#endif
    };
#ifdef MUTANT_EPOCH_EARLY
    open_epoch();
#endif
#ifdef LOG_TWO_STEP
#ifdef MUTANT_PUBLISH_FIRST
    publish(fetched);
#endif
    if
    :: fetched -> armed = 1; printf("the log is re-armed\n")
    :: else
    fi;
#ifdef MUTANT_PUBLISH_FIRST
    fetched = 0;
#endif
#endif
    d_step { fetched = fetched | side; side = 0 };      /* S12: every sync publishes the side plane */
    publish(fetched);
    fetched = 0;
    printf("synced\n");
    release(lock)
}

/* S4: only after all is re-armed and published does the guest hear of an epoch. */
inline open_epoch()
{
    atomic {
        if
        :: !done -> last_epoch++; epoch = last_epoch; told = epoch; printf("epoch %d opens\n", epoch)
        :: else
        fi
    }
}

inline end_session()
{
    atomic { done = 1; epoch = 0; told = 0; held = 0; printf("DONE\n") }
}

active proctype Controller()
{
    byte round;
    bit fetched;
    sync();
    do
    :: round < ROUNDS ->
        round++;
#ifndef MUTANT_EPOCH_EARLY
        acquire(lock);
        open_epoch();
        release(lock);
#endif
        if
        :: atomic { !lock -> epoch = 0; told = 0; printf("STOP\n") }    /* before the sync, */
        :: skip                                                        /* or not: the sync ends it */
        fi;
        if
        :: atomic { !lock && !done -> end_session() }                   /* S5: cancelled, or no more of it */
        :: skip
        fi;
        if
        :: round < ROUNDS -> sync()
        :: else
        fi
    :: round == ROUNDS -> break
    od;
    /* S8: stop the guest, senders quiet, last sync, and only then the lists. */
    atomic { !dma -> stopped = 1; printf("the guest stops\n") };
    quiet = 1;
    !sending;
    sync();
    acquire(lock);
    settle_owed();
    atomic {
        kept = !dirty && !hinted;
        filled = !dirty && hinted;
        printf("lists: dirty %d, hinted %d\n", dirty, hinted)
    };
    release(lock);
    if
    :: kept ->
        assert(dmem);                                             /* nobody would send it any more */
        assert(!cares || dmem == smem)                            /* stale content, or a lost write */
    :: filled -> assert(!cares)                                   /* a page that is in use would read as free */
    :: else
    fi
}
