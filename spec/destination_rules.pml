/* The destination after the switch (design section 4) for one page: the kernel, the planes, and the processes
 * that serve the guest there: the reader of the descriptor, the placers of the two streams, the retry of what was
 * parked. Included by the models that run a guest there; they define FAILS, how many placements fail.
 *
 * No process polls: each waits for something that has changed. So a state in which nothing can move, and the guest
 * waits for its page, is a stall, and spin reports it as an invalid end state. */

/* The kernel -------------------------------------------------------------------------------------- */

bit present;            /* the page is there                                            */
byte mem;               /* its content; 0: zeros                                        */
byte changing;          /* mmap_changing: discards whose event was not let go by        */
bit waiting;            /* the vCPU sleeps in its fault                                 */
bit unread;             /* the message of that fault was not read                       */
bit registered = 1;

#define NONE   0
#define QUEUED 1
#define READ   2
byte event;             /* the discard's REMOVE                                         */

#define DONE   1        /* what a placement came to */
#define EXISTS 2
#define AGAIN  3
#define FAILED 4

inline wake()
{
    d_step { waiting = 0; unread = 0 }
}

inline place(content, outcome)
{
    d_step {
        if
        :: changing -> outcome = AGAIN
        :: !changing && present -> outcome = EXISTS             /* and wakes nobody */
        :: else -> present = 1; mem = content; waiting = 0; unread = 0; outcome = DONE
        fi
    }
}

/* The planes -------------------------------------------------------------------------------------- */

bit claimed, received, released, requested;
bit fillable;           /* the destination's hinted plane                               */
bit noted;              /* a fault was read and not answered                            */
bit rewoken;            /* D15: woken although received                                 */
bit later;              /* to be served again: the kernel said EAGAIN                   */
bit parked;             /* D7: a copy whose claim we hold                               */
byte parked_content;
byte failures;

byte readers;           /* D5: placers hold the shared side, the reader the exclusive one */
bit writer;

#define lock_shared()    atomic { !writer -> readers++ }
#define unlock_shared()  readers--
#define lock_exclusive() atomic { !writer && !readers -> writer = 1 }
#define unlock_exclusive() writer = 0

/* The link ---------------------------------------------------------------------------------------- */

#define PAGES   1
#define FILL    2
#define ANSWER  3       /* "already sent": nothing to place                             */
#define END     4

chan bulk   = [1] of { byte, byte, bit };       /* kind, content, again */
chan urgent = [2] of { byte, byte, bit };
chan requests = [2] of { bit };                 /* again */
byte copies;            /* content or fill that came, but for answers to `again` (W2, S7) */
bit ended;

/* D9, in this order, under the shared side. */
inline serve(outcome, probe)
{
    probe = 0;
    lock_shared();
    if
    :: released ->
        /* D3: zeros, with no claim; it may repeat. */
        place(0, outcome);
        if
        :: outcome == AGAIN -> later = 1
        :: outcome == EXISTS -> wake(); noted = 0
        :: else -> noted = 0; printf("zeros are filled in\n");
#ifdef MUTANT_FILL_CLEARS
            released = 0
#endif
        fi
    :: !released && received ->
        if
        :: rewoken -> probe = 1
        :: else -> rewoken = 1; wake(); noted = 0
        fi
    :: !released && !received && claimed -> skip        /* whoever has the claim places it, which wakes */
    :: !released && !received && !claimed && fillable ->
        atomic {
            if
            :: claimed -> outcome = DONE                /* somebody was faster */
            :: else -> claimed = 1; outcome = 0
            fi
        };
        if
        :: outcome == DONE
        :: else ->
            place(FILL_CONTENT, outcome);
            if
            :: outcome == AGAIN -> claimed = 0; later = 1       /* the reader must not wait for a place to park */
            :: outcome == EXISTS -> received = 1; requested = 0; wake(); noted = 0
            :: else -> received = 1; requested = 0; noted = 0; printf("the fill is placed\n")
            fi
        fi
    :: else ->
        atomic {
            if
            :: !requested -> requested = 1; requests ! 0; printf("requested\n")
            :: else                                     /* asked already */
            fi
        }
    fi;
    unlock_shared();
    if
    :: probe ->
        /* D15: faults keep coming for a received page: the kernel is asked. */
        lock_exclusive();
        if
        :: released -> later = 1
        :: !released && changing -> later = 1
        :: else -> assert(present); wake(); noted = 0   /* else a healthy page was lost */
        fi;
        unlock_exclusive()
    :: else
    fi;
    d_step { outcome = 0; probe = 0 }
}

/* D4: one reader; all faults and all events of a batch first, then the faults are served. */
active proctype Reader()
{
    bit fault, removed, probe;
    byte outcome;
end:
    do
    :: unread || event == QUEUED ->
        /* D5: the exclusive side across read() and the marking. */
        lock_exclusive();
        do
        :: atomic { unread -> unread = 0; fault = 1; noted = 1 }
        :: atomic { !unread && event == QUEUED -> event = READ; removed = 1; printf("REMOVE is read\n") };
            /* D3: from here on, for ever. */
            d_step { released = 1; requested = 0 }
        :: !unread && event != QUEUED -> break
        od;
        unlock_exclusive();
        if
#ifdef MUTANT_WAKE_DROPPED
        :: fault ->
#else
        /* D3: who waited for a page that was released gets zeros there and then. */
        :: fault || (removed && noted) ->
#endif
            serve(outcome, probe)
        :: else
        fi;
        d_step { fault = 0; removed = 0 }
    od
}

/* D1, D2, D5, D8, D10: one frame of a stream. */
proctype Placer(chan lane)
{
    byte kind, content, outcome;
    bit again, ask, won, park;
end:
    do
    :: lane ? kind, content, again ->
        if
        :: kind == END -> ended = 1
        :: kind == ANSWER -> printf("\"already sent\"\n")     /* D9: requested stays set */
#ifdef MUTANT_CLAIMS
        :: kind == PAGES || kind == FILL ->
            /* "Just resend, and ignore EEXIST": the kernel is the barrier, once a copy has come. */
            lock_shared();
            outcome = 0;
            if
            :: released && !received -> printf("a copy is dropped\n")
            :: else -> place(content, outcome)
            fi;
            if
            :: !outcome
            :: outcome == AGAIN -> parked = 1; parked_content = content
            :: outcome == EXISTS -> wake()
            :: else -> received = 1; requested = 0; noted = 0; printf("placed\n")
            fi;
            unlock_shared()
#else
        :: kind == PAGES || kind == FILL ->
#ifdef MUTANT_STRICT_AGAIN
            again = 0;
#endif
#ifndef TOLERANT
            /* W2: a strict peer never gets a page twice; what it asked for with `again` does not count (S7). */
            if
            :: !again -> copies++; assert(copies <= 1)
            :: else
            fi;
#endif
#ifndef MUTANT_CHECK_EARLY
            lock_shared();
#endif
            /* D1: test-and-set decides. */
            atomic {
                if
                :: !released && !claimed -> claimed = 1; won = 1; outcome = 0
                :: else -> printf("a copy is dropped\n")
                fi
            };
            if
            :: won ->
#ifdef MUTANT_RECEIVED_EARLY
                received = 1;
#endif
                if
                :: place(content, outcome)
                :: atomic { failures < FAILS && !changing && !present -> failures++; outcome = FAILED }
                fi;
                if
                :: outcome == DONE ->
                    printf("placed\n");
                    received = 1; requested = 0; noted = 0      /* D8: only now */
                :: outcome == EXISTS -> received = 1; requested = 0; wake(); noted = 0     /* D2 */
                :: outcome == AGAIN -> park = 1
                :: else ->
                    /* D8: keep data and claim, and try again; or give the claim back, and ask `again`. */
                    printf("the placement fails\n");
                    if
                    :: park = 1
                    :: claimed = 0; ask = 1; wake()     /* D10 */
                    fi
                fi
            :: !won && received -> wake()       /* D10 */
            :: else
            fi;
#ifndef MUTANT_CHECK_EARLY
            unlock_shared();
#endif
            if
            :: park -> parked_content = content; parked = 1     /* with neither side held (D5) */
            :: else
            fi;
            if
#ifndef MUTANT_AGAIN
            :: ask -> requested = 1; requests ! 1; printf("asked again\n")
#endif
            :: else
            fi
#endif
        fi;
        d_step { kind = 0; content = 0; outcome = 0; again = 0; ask = 0; park = 0; won = 0 }
    od
}

/* D7: the timer. It would find EAGAIN while a discard is pending, so it waits for that here. */
active proctype Retry()
{
    byte outcome;
    bit probe;
end:
    do
    :: parked && !changing ->
        lock_shared();
        if
        :: released -> parked = 0; printf("a parked copy is dropped\n")     /* D3: who waited was given zeros */
        :: else ->
            place(parked_content, outcome);
            if
            :: outcome == AGAIN
            :: outcome == EXISTS -> received = 1; requested = 0; wake(); noted = 0; parked = 0
            :: else -> received = 1; requested = 0; noted = 0; parked = 0; printf("placed after parking\n")
            fi
        fi;
        unlock_shared();
        outcome = 0
    :: later && !changing -> later = 0; serve(outcome, probe)
    od
}
