/* The destination after the switch, with a guest that touches, writes and discards the page while its copy
 * arrives (D1 to D11, D15, S7). The source is stopped; its planes are as the lists of the switch left them.
 *
 * Strict (the default): the source keeps its rules, and no copy comes twice. TOLERANT: a source that resends
 * whatever it is asked for, as was proposed for QEMU; the destination must bear it. */

#include "source_rules.pml"

#define FILL_CONTENT 0
#ifndef FAILS
#define FAILS 1
#endif
#ifndef TOUCHES
#define TOUCHES 2
#endif
#ifndef DISCARDS
#define DISCARDS 1
#endif

#define OLD 1           /* what the source has                                          */
#define NEW 2           /* what the guest writes here                                   */

#include "destination_rules.pml"

bit go;
byte truth;             /* what the guest must read                                     */
bit cares;              /* its content is defined                                       */

#define touch() \
    printf("guest touches, reads %d\n", mem); assert(!cares || mem == truth); \
    if :: mem = NEW; truth = NEW; cares = 1 :: skip fi

active proctype Vcpu()
{
    byte touches;
    go;
    do
    :: touches < TOUCHES ->
        touches++;
        do
        :: atomic { present -> touch(); break }
        :: atomic { !present -> waiting = 1; unread = 1; printf("guest faults\n") };
            !waiting            /* here it stalls if nobody wakes it */
        od
    :: touches == TOUCHES -> break
    od
}

/* Another vCPU, or the balloon's thread: MADV_DONTNEED. Its content is undefined until it is gone, and zeros
 * after. */
active proctype Discarder()
{
    byte discards;
    do
    :: atomic { go && discards < DISCARDS ->
            discards++; cares = 0; changing++; event = QUEUED; printf("guest discards\n") };
        atomic { event == READ -> event = NONE; changing-- };   /* read: the issuer goes on */
        atomic { present = 0; truth = 0; cares = 1; printf("the page is zapped\n") }
    :: go -> break          /* at any time: no discard is to rescue a fault that stalls */
    od
}

active proctype Push()
{
    bit got;
    go;
    do
    :: dirty ->
        take(got);
        if
        :: got -> bulk ! PAGES, OLD, 0; printf("pushed\n")
        :: else
        fi
    :: !dirty -> break
    od
}

/* S7: every request gets an answer. */
active proctype Answers()
{
    bit again;
    byte kind;
end:
    do
    :: requests ? again ->
        if
        :: again -> d_step { dirty = 0; hinted = 0 }; urgent ! PAGES, OLD, 1
        :: else ->
            resolve(kind);
            if
            :: kind == OWED -> urgent ! PAGES, OLD, 0
            :: kind == FREE -> urgent ! FILL, FILL_CONTENT, 0
#ifdef TOLERANT
            :: kind == SENT -> urgent ! PAGES, OLD, 0
#else
            :: kind == SENT -> urgent ! ANSWER, 0, 0
#endif
            fi
        fi;
        d_step { again = 0; kind = 0 }
    od
}

init
{
    atomic {
        if      /* as the switch left it */
        :: dirty = 1; truth = OLD; cares = 1
        :: dirty = 0; hinted = 1; fillable = 1          /* told which pages are hinted */
        :: dirty = 0; hinted = 1                        /* not told */
        :: dirty = 0; claimed = 1; received = 1; present = 1; mem = OLD; truth = OLD; cares = 1
        :: dirty = 0; released = 1; truth = 0; cares = 1        /* a zero page of precopy */
        fi;
        run Placer(bulk);
        run Placer(urgent);
        go = 1
    }
}
