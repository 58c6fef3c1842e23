/* What a thread that moves pages in bulk does for those that somebody waits for. On the thread's own behalf, without privilege. */
#ifndef PAGECORE_TURNS_H
#define PAGECORE_TURNS_H

#include <sched.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "_sync.h"

enum {
    PAGECORE_BULK_NICENESS = 10,            /* a tenth of the processor beside whoever wants all of it */
    PAGECORE_LONG_TURN_NS = 1000000,        /* answering a fault takes less: whoever keeps the processor longer works */
    PAGECORE_NO_TURNS_NS = 100000000,       /* how long such a one is not let by again */
};

/* Have this thread run after the others of its processor; on Linux a thread has a niceness of its own. */
static inline void pagecore_give_way(void)
{
    const id_t thread = (id_t)syscall(SYS_gettid);
    setpriority(PRIO_PROCESS, thread, getpriority(PRIO_PROCESS, thread) + PAGECORE_BULK_NICENESS);
}

/* Between two pieces of bulk: let run who was woken meanwhile. The kernel itself would often not do so before its next tick:
 * a bulk thread that has slept on its socket is owed time, which comes before that of who wakes. A yield forfeits it.
 * Beside threads that never sleep that would leave nothing: who takes a long turn is not let by again for a while. Until
 * when, each thread keeps where it wants: of __thread, which the C library frees in whatever thread ends next, without a
 * lock that ThreadSanitizer sees, it would report a race.
 */
static inline void pagecore_let_by(uint64_t *not_before)
{
    const uint64_t before = pagecore_now_ns();
    if (before < *not_before)
        return;
    sched_yield();
    const uint64_t after = pagecore_now_ns();
    if (after - before > PAGECORE_LONG_TURN_NS)
        *not_before = after + PAGECORE_NO_TURNS_NS;
}

#endif
