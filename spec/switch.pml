/* From precopy to COMPLETE: hints, a send that fails, the lists, RUN, push, requests, END, `again`, unregister
 * (S3, S6 to S8, D9 to D11, D16). The guest at the destination touches its page and discards nothing:
 * destination.pml has that. */

#include "source_rules.pml"

#ifndef FAILS
#define FAILS   1
#endif
#define TOUCHES 1
#define STEPS   6       /* of precopy: takes, writes and hints                          */
#define POISON  9       /* what a guest that poisons its free pages has in them         */

byte fill;              /* S6: the session's fill: zeros or the guest's poison          */
#define FILL_CONTENT fill

#include "destination_rules.pml"

byte smem = 1;          /* content at the source                                        */
byte sent;              /* the newest copy that the destination stored in precopy       */
bit cares = 1;          /* what the guest must read is smem                             */
bit capable;            /* the peer's capability `hinted-runs`                          */
bit running;            /* RUN was acknowledged by the first instruction                */
bit finishing, named;   /* FINISH, and whether it names the page as still hinted        */
bit completed;

#define NOTHING 0
#define NEWEST  1
#define STALE   8

chan lists = [1] of { bit, bit };       /* discard, hinted */
chan acknowledged = [0] of { bit };

active proctype Vcpu()
{
    byte touches;
    running;
    do
    :: touches < TOUCHES ->
        touches++;
        do
        :: atomic { present ->
            printf("guest reads %d\n", mem); assert(!cares || mem == smem); break }
        :: atomic { !present && !registered ->
            printf("guest reads zeros: nothing is registered\n"); assert(!cares || smem == 0); break }
        :: atomic { !present && registered -> waiting = 1; unread = 1; printf("guest faults\n") };
            !waiting
        od
    :: touches == TOUCHES || completed -> break
    od
}

/* Precopy, in steps that follow one another: what runs beside what is source.pml's and rounds.pml's. */
inline precopy()
{
    do
    :: steps < STEPS && dirty && !taken -> steps++; take(got); taken = 1; printf("taken\n")
    :: taken -> sent = smem; taken = 0; printf("sent\n")
    :: taken -> put_back(); taken = 0; printf("the send fails, put back\n")
    :: steps < STEPS && !taken && cares && smem == 1 -> steps++; smem = 2; publish(1); printf("written, synced\n")
    :: steps < STEPS && cares ->
        steps++;
        /* The guest frees the page. It may leave zeros or its poison there, and then that is what it must find. */
        if
#ifndef MUTANT_HINTED_PLANE
        :: smem = fill; publish(1)
#endif
        :: !fill -> cares = 0; publish(1)
        fi;
        printf("freed, synced, and hinted\n");
        hint_page(before, fetched)
#ifdef MUTANT_QUIET
    :: break
#else
    :: !taken -> break          /* S8: senders quiet */
#endif
    od
}

active proctype Source()
{
    bit got, before, fetched, taken, discard, list_hinted;
    byte steps;
    atomic {
        if
        :: fill = 0
#ifndef MUTANT_HINTED_PLANE     /* the thread's guest: it does not look at free pages */
        :: fill = POISON
#endif
        fi;
        if
        :: capable = 1
        :: capable = 0
        fi;
        precopy();
        settle_owed();
        /* S8 (b): what the destination cannot fill by itself, and does not read as zeros, is owed. */
        if
#ifndef MUTANT_FILL
        :: !capable && hinted && !dirty && fill -> dirty = 1; hinted = 0
#endif
        :: else
        fi;
        /* Of what was stored, only this matters from here on. */
        before = 0; fetched = 0; steps = 0; got = 0;
        sent = (!sent -> NOTHING : (sent == smem -> NEWEST : STALE));
        smem = (smem == 2 -> 1 : smem);
        discard = dirty || hinted;
        list_hinted = capable && hinted && !dirty;
        printf("lists: discard %d, hinted %d\n", discard, list_hinted)
    };
    lists ! discard, list_hinted;
    acknowledged ? _;
#ifdef MUTANT_QUIET
    atomic {
        if
        :: taken -> put_back(); taken = 0; printf("the send fails, put back\n")
        :: else
        fi
    };
#endif
    running = 1;        /* RUN */
    do
    :: dirty ->
        take(got);
        if
        :: got -> bulk ! PAGES, smem, 0; printf("pushed\n")
        :: else
        fi
    :: !dirty -> break
    od;
    if
    :: bulk ! END, 0, 0;
        /* D16: nothing is dirty; name what is still hinted. */
        atomic { named = hinted && !dirty; finishing = 1; printf("END, FINISH\n") }
    :: skip             /* not for a long time: the end is not to rescue a fault that stalls */
    fi
}

/* S7, beside the push, until COMPLETE. */
active proctype Answers()
{
    bit again;
    byte kind;
end:
    do
    :: requests ? again ->
        if
        :: again -> d_step { dirty = 0; hinted = 0 }; urgent ! PAGES, smem, 1
        :: else ->
#ifdef MUTANT_RESOLVE_APART
            kind = (dirty -> OWED : (hinted -> FREE : SENT));
            atomic { dirty = 0; hinted = 0 };
#else
            resolve(kind);
#endif
            if
            :: kind == OWED -> urgent ! PAGES, smem, 0
            :: kind == FREE -> urgent ! FILL, (capable -> fill : 0), 0
            :: kind == SENT -> urgent ! ANSWER, 0, 0
            fi
        fi;
        d_step { again = 0; kind = 0 }
    od
}

active proctype Destination()
{
    bit discard, list_hinted;
    atomic {
        lists ? discard, list_hinted ->
        /* D0. The hinted plane taken out, the peer discards what it never got, as QEMU does. */
        if
        :: discard || sent == NOTHING -> mem = 0
        :: else -> claimed = 1; received = 1; present = 1; mem = (sent == NEWEST -> smem : STALE)
        fi;
        fillable = list_hinted;
        run Placer(bulk);
        run Placer(urgent)
    };
    acknowledged ! 1;
    /* D16. */
end:
    finishing && ended;
    !parked && !later;
    if
#ifdef MUTANT_COMPLETE
    :: !received && fillable && !(named && fill == 0) ->
#else
    :: !received && !(fillable && named && fill == 0) ->
#endif
        atomic { requested = 1; requests ! 1; printf("asked again at the end\n") };
        received
    :: else
    fi;
    !parked && !later;
    lock_exclusive();
    atomic { registered = 0; wake(); printf("unregisters\n") };
    unlock_exclusive();
    completed = 1
}
