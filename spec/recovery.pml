/* One loss of the link, at any time, and what both sides do about it (S8, S9, W6, D8, D9). Generation 0 is before it,
 * 1 after. What was under way may be lost, or be read by the destination later on. All pages travel on one
 * stream here. */

#include "source_rules.pml"

#define WRITES 2
#define FREES  1

bit up = 1;
bit logged;
byte smem = 1;
bit cares = 1;          /* the content is defined                                       */
bit source_runs = 1, destination_runs;
bit capable;            /* the peer's capability `hinted-runs`                          */
bit generation;         /* the source's                                                 */

bit joined;             /* the generation of the destination                            */
bit applied;            /* a list was applied, and the memory registered                */
bit ran;
bit claimed, received, requested, fillable, present;
byte dmem;
bit placing;            /* a placer is between a frame and `received`                   */

#define PAGES   1
#define FILL    2
#define ANSWER  3
#define MARKER  4
#define LIST    5
#define RUN     6
#define FLUSHED 7
#define APPLIED 8

chan pages[2] = [2] of { byte, byte };                  /* by generation: kind, content */
chan control  = [1] of { bit, byte, bit, bit };         /* generation, kind, lists      */
chan back     = [3] of { bit, byte };                   /* generation, kind             */
chan requests = [2] of { bit };                         /* generation                   */
chan hello    = [0] of { bit };                         /* reconnect                    */
chan report   = [0] of { bit, bit, bit };               /* list applied, ran, settled   */
chan decision = [0] of { bit };                         /* 1: go on; 0: back to precopy */
chan cleared  = [0] of { bit };                         /* precopy again: planes clear, unregistered */

/* The link breaks once, or never; so that no stall waits for a recovery to end it. */
active proctype Link()
{
    if
    :: atomic { up = 0; printf("the link is lost\n");
        if
        :: do :: pages[0] ? _, _ :: empty(pages[0]) -> break od
        :: skip         /* it came, and was not read yet */
        fi;
        if
        :: do :: control ? _, _, _, _ :: empty(control) -> break od
        :: skip
        fi
    }
    :: skip
    fi
}

active proctype Guest()
{
    byte writes, frees;
    do
    :: atomic { source_runs && writes < WRITES ->
        writes++; smem++; cares = 1; logged = 1; printf("guest writes version %d\n", smem) }
    :: atomic { source_runs && frees < FREES && dirty && !logged ->
        /* Freed, and hinted in time: what is late is source.pml's. */
        frees++; cares = 0; dirty = 0; hinted = 1; printf("freed and hinted\n") }
    :: atomic { destination_runs -> break }
    od
}

inline sync()
{
    atomic { fetched = logged; logged = 0; publish(fetched); fetched = 0 }
}

#define two_run() assert(!(source_runs && destination_runs))

/* S1; a send that meets the loss puts its page back. */
inline send(kind, content)
{
    if
    :: atomic { up -> pages[generation] ! kind, content }
    :: !up -> put_back()
    fi
}

active proctype Source()
{
    bit got, fetched, list_applied, has_run, settled, from;
    byte kind;
    atomic {
        if
        :: capable = 1
        :: capable = 0
        fi
    };

precopy:
    do
    :: up && dirty ->
        take(got);
        if
        :: got -> printf("sends version %d\n", smem); send(PAGES, smem)
        :: else
        fi
    :: up && logged -> sync()
    :: up -> break
    :: !up -> goto lost
    od;
    /* S8: stop, last sync, barrier, lists, acknowledgement, RUN. */
    source_runs = 0;
    sync();
    if
    :: atomic { up -> pages[generation] ! MARKER, 0 }
    :: !up -> goto lost
    fi;
    do
    :: back ? from, kind ->
        if
        :: from == generation -> assert(kind == FLUSHED); break
        :: else
        fi
    :: !up -> goto lost
    od;
    atomic {
        settle_owed();
        if
        :: up -> control ! generation, LIST, dirty || hinted, hinted && !dirty && capable; printf("lists are sent\n")
        :: !up -> goto lost
        fi
    };
    do
    :: back ? from, kind ->
        if
        :: from == generation -> assert(kind == APPLIED); break
        :: else
        fi
    :: !up -> goto lost
    od;
hand_over:
    if
    :: atomic { up -> control ! generation, RUN, 0, 0; printf("RUN is handed to the link\n") }
    :: !up -> goto lost
    fi;
end_postcopy:
    do
    :: up && dirty ->
        take(got);
        if
        :: got -> send(PAGES, smem)
        :: else
        fi
    :: requests ? from ->
        if
        :: from == generation ->
            resolve(kind);
            if
            :: kind == OWED -> send(PAGES, smem)
            :: kind == FREE -> send(FILL, 0)
            :: kind == SENT ->
                if
                :: atomic { up -> pages[generation] ! ANSWER, 0 }
                :: !up -> goto lost
                fi
            fi
        :: else
        fi
    :: !up -> goto lost
    od;

lost:
#ifdef MUTANT_RUN_TWICE
    atomic { source_runs = 1; two_run() };
#endif
    /* W6: a new generation. */
    atomic {
        do :: back ? _, _ :: requests ? _ :: empty(back) && empty(requests) -> break od;
        generation = 1;
        up = 1
    };
    hello ! generation;
    report ? list_applied, has_run, settled;
    if
    :: !list_applied ->
        /* S9: nothing is known about versions. The log is collected, and what it says is owed anyway. */
#ifdef MUTANT_SETTLED_EARLY
        reload(settled);
#else
        atomic { logged = 0; owe_all() };
#endif
        atomic { source_runs = 1; two_run(); printf("precopy again\n") };
        goto precopy
    :: list_applied ->
#ifndef MUTANT_RELOAD
        reload(settled);
#endif
        printf("reload: settled %d, dirty %d, hinted %d\n", settled, dirty, hinted);
        if
        :: has_run -> decision ! 1; goto end_postcopy
        :: !has_run -> decision ! 1; goto hand_over
        :: !has_run ->
            /* It denies having run the guest, which may go on here. */
            decision ! 0;
#ifndef MUTANT_BACK_UNACKNOWLEDGED
            cleared ? _;            /* else a page of the new precopy would be placed as one of the old switch */
#endif
            atomic { logged = 0; owe_all(); source_runs = 1; two_run(); printf("back to precopy\n") };
            goto precopy
        fi
    fi
}

/* Pages, before and after the switch. */
active proctype Placer()
{
    bit from;
    byte kind, content;
end:
    do
    :: atomic { nempty(pages[0]) || (joined && nempty(pages[1])) ->
            placing = 1;
            if
            :: pages[0] ? kind, content -> from = 0         /* read late, maybe */
            :: joined && nempty(pages[1]) -> pages[1] ? kind, content; from = 1
            fi };
        if
#ifndef MUTANT_OLD_FRAMES
        :: from != joined -> printf("a frame of an older generation is refused\n")      /* W6 */
        :: from == joined && kind == MARKER ->
#else
        :: kind == MARKER ->
#endif
            if
            :: atomic { up -> back ! from, FLUSHED }
            :: !up
            fi
        :: kind == ANSWER -> skip
#ifndef MUTANT_OLD_FRAMES
        :: from == joined && kind <= FILL ->
#else
        :: kind <= FILL ->
#endif
            if
            :: !applied -> atomic { dmem = content; received = 1; printf("stores %d\n", content) }
            :: applied ->
#ifndef MUTANT_OLD_FRAMES
                assert(!claimed);       /* W2: a strict peer never gets a page twice */
#endif
                if
                :: atomic { !claimed -> claimed = 1 };
                    atomic { present = 1; dmem = content; printf("places %d\n", content) };
                    atomic { received = 1; requested = 0 }      /* D8 */
                :: else
                fi
            fi
        fi;
        atomic { placing = 0; kind = 0; content = 0; from = 0 }
    od
}

/* Unregister, close the descriptor, clear every plane. */
inline back_to_precopy()
{
    d_step { claimed = 0; received = 0; requested = 0; fillable = 0; present = 0; applied = 0 }
}

active proctype Destination()
{
    bit from, discard, list_hinted, go_on, settled;
    byte kind;
end:
    do
    :: control ? from, kind, discard, list_hinted ->
        if
#ifdef MUTANT_RUN_QUEUED
        :: from != joined && kind != RUN ->
#else
        :: from != joined ->      /* W6; and a queued RUN of an older generation is not executed (S9) */
#endif
            printf("a command of an older generation is refused\n")
        :: else ->
            if
            :: kind == LIST ->
                atomic {
                    if
                    :: discard -> claimed = 0; received = 0; present = 0; dmem = 0
                    :: else -> claimed = received; present = received
                    fi;
                    requested = 0; fillable = list_hinted; applied = 1; printf("lists are applied\n")
                };
                if
                :: atomic { up -> back ! joined, APPLIED }
                :: !up
                fi
            :: kind == RUN && !ran ->
                atomic { ran = 1; destination_runs = 1; two_run(); printf("the guest runs at the destination\n") }
            :: else
            fi
        fi
    :: hello ? from ->
#ifndef MUTANT_PLACERS
        /* S9: placers quiet, and frames of the old generation are refused from here on; only then the report. */
        atomic { !placing -> joined = from };
#else
        joined = from;
#endif
        atomic {
            settled = received;
            if
#ifndef MUTANT_SETTLED_EARLY
            :: !applied -> back_to_precopy()        /* before it reports: the next page may come at once */
#endif
            :: else
            fi;
            report ! applied, ran, settled
        };
        if
        :: applied ->
            decision ? go_on;
            if
            :: go_on ->
                /* D9: what is still requested is asked again. */
                atomic {
                    if
#ifndef MUTANT_REASK
                    :: requested && !received -> requests ! joined; printf("asked again after the reconnect\n")
#endif
                    :: else
                    fi
                }
            :: !go_on ->
                back_to_precopy();
#ifndef MUTANT_BACK_UNACKNOWLEDGED
                cleared ! 1
#endif
            fi
        :: !applied
        fi
    od
}

/* The guest at the destination touches the page once; the reader serves the fault (D9). */
active proctype Vcpu()
{
end:
    destination_runs;
    if
    :: present
    :: !present ->
        printf("guest faults\n");
        if
        :: atomic { fillable && !claimed ->
            claimed = 1; present = 1; dmem = 0; received = 1; printf("filled\n") }
        :: atomic { !fillable && !claimed && !requested ->
            requested = 1;
            if
            :: up -> requests ! joined; printf("requested\n")
            :: !up
            fi }
        :: atomic { claimed || requested }
        fi
    fi;
    present;                /* here it stalls if nobody answers */
    printf("guest reads %d\n", dmem);
    assert(!cares || dmem == smem)
}
