/* Precopy over two bulk streams, and the switch: rounds, barriers, zero pages, the discard list, and what is
 * still under way then (W1, W5, D0, D1, S8). A sender and a receiver for each stream; a frame may be as late as
 * its stream lets it. */

#include "source_rules.pml"

#define ROUNDS 2
#define WRITES 2

bit logged;
byte smem = 1;          /* content at the source: 0 is a page of zeros, else a version  */
bit stopped;
byte sending;           /* senders that hold the page                                   */
bit quiet;              /* senders take nothing just now                                */
bit running;            /* the guest was let go at the destination                      */

bit claimed, received, released, zero;
byte dmem;              /* content at the destination; memory never stored to is zeros  */
bit present;            /* after the switch: the page is there                          */
byte barrier;           /* the last round that was acknowledged, plus one               */
byte last_version = 1;

#define PAGES  1
#define ZEROS  2
#define MARKER 3

chan stream[2] = [2] of { byte, byte, byte };       /* kind, content, round */
chan acknowledged = [2] of { byte };
byte round;

active proctype Guest()
{
    byte writes;
    do
    :: atomic { !stopped && writes < WRITES ->
        writes++; logged = 1;
        if
        :: last_version++; smem = last_version
        :: smem = 0
        fi;
        printf("guest writes %d\n", smem) }
    :: atomic { stopped -> break }
    od
}

/* S1, over one stream each. */
active [2] proctype Sender()
{
    byte content;
    bit got;
end:
    do
    :: atomic { dirty && !quiet -> sending++; take(got) };
        if
        :: got ->
            content = smem;
            if
            :: atomic { content -> stream[_pid - 1] ! PAGES, content, round; printf("sends %d\n", content) }
            :: atomic { !content -> stream[_pid - 1] ! ZEROS, 0, round; printf("sends zeros\n") }
            :: put_back()
            fi
        :: else
        fi;
        sending--
    od
}

/* D0: store plainly before the switch; D1 after it. One process for each stream. */
active [2] proctype Receiver()
{
    byte kind, content, number;
end:
    do
    :: stream[_pid - 3] ? kind, content, number ->
        if
        :: kind == MARKER -> acknowledged ! 1
        :: else ->
            /* W5: a frame of an earlier round than the last barrier ends the session. */
            assert(number >= barrier);
            atomic {
                if
                :: !running && kind == PAGES ->
                    dmem = content; received = 1; zero = 0; printf("stores %d\n", content)
                :: !running && kind == ZEROS ->
#ifdef MUTANT_ZERO_PLANE
                    zero = 1; printf("marks zero\n")
#else
                    /* D0: written where content was stored, else only marked. */
                    if
                    :: received -> dmem = 0; printf("stores zeros\n")
                    :: !received -> zero = 1; printf("marks zero\n")
                    fi
#endif
                :: running ->
                    /* A placer wins the page or drops the copy (D1, D3). */
                    if
                    :: !released && !claimed ->
                        claimed = 1; present = 1; received = 1; dmem = content; printf("places %d\n", content)
                    :: else -> printf("drops %d\n", content)
                    fi
                fi
            }
        fi
    od
}

/* W5: everything of this round has been stored before anything of the next one leaves. */
inline flush()
{
    stream[0] ! MARKER, 0, round;
    stream[1] ! MARKER, 0, round;
    acknowledged ? _;
    acknowledged ? _;
    barrier = round + 1
}

inline sync()
{
    d_step { fetched = logged; logged = 0 };
    publish(fetched)
}

active proctype Controller()
{
    bit fetched;
    do
    :: round < ROUNDS - 1 ->
        /* A round: senders go as they like, then they are quiet: the marker is the last frame of the round. */
        quiet = 1; !sending;
#ifndef MUTANT_ROUND_BARRIER
        flush();
#endif
        sync();
        round++;
        quiet = 0
    :: else -> break
    od;
    stopped = 1; printf("the guest stops\n");
    quiet = 1; !sending;
    sync();
#ifndef MUTANT_SWITCH_BARRIER
    flush();
#endif
    round++;
    /* S8 (a): discard what is not both sent and clean; the destination turns its planes round (D0). */
    d_step {
        printf("switch, dirty %d, received %d, zero %d\n", dirty, received, zero);
        if
        :: dirty -> claimed = 0; received = 0; zero = 0; dmem = 0
        :: else -> claimed = received; present = received; released = zero
        fi;
        running = 1
    };
    quiet = 0;
    /* The guest, at the destination: a touch waits for the page, zeros are there at once (D3). It waits for ever
     * for one that nobody sends. */
    if
    :: atomic { present -> printf("guest reads %d\n", dmem); assert(dmem == smem) }
    :: atomic { released && !present -> printf("guest reads zeros\n"); assert(smem == 0) }
    fi
}
