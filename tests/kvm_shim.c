/* Preloaded before libc: a KVM that lacks a capability, or that is cut short as it resets dirty rings.
 *
 * LACKING is a list of capabilities, separated by commas, that KVM_CHECK_EXTENSION denies. IDLE_RESETS is how many calls
 * of KVM_RESET_DIRTY_RINGS come to nothing first, as from Linux 6.16 on where a signal is pending; with IDLE_ERRNO they
 * fail. With SIGNAL set, each sends that signal to its own thread right before KVM begins. `resets` and
 * `unblocked_resets` count the calls, and those of threads that some signal can still interrupt.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preloaded_ioctl.h"

long resets, unblocked_resets;

static int is_lacking(unsigned long capability)
{
    const char *list = getenv("LACKING");
    char *end;

    while (list && *list) {
        if (strtoul(list, &end, 10) == capability)
            return 1;
        list = *end ? end + 1 : end;
    }
    return 0;
}

static long idle_resets(void)
{
    static long left = -1;
    const char *count = getenv("IDLE_RESETS");

    if (left < 0)
        left = count ? atol(count) : 0;
    return left ? left-- : 0;
}

static void look_at_signals(void)
{
    const uint64_t never = UINT64_C(1) << (SIGKILL - 1) | UINT64_C(1) << (SIGSTOP - 1);
    const char *number = getenv("SIGNAL");
    uint64_t blocked = 0;

    /* from the kernel: the C library does not show two signals of its own */
    syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &blocked, sizeof blocked);
    __atomic_fetch_add(&resets, 1, __ATOMIC_RELAXED);
    if (~blocked & ~never)
        __atomic_fetch_add(&unblocked_resets, 1, __ATOMIC_RELAXED);
    if (number)
        raise(atoi(number));
}

static int answer(int fd, unsigned long request, void *argument)
{
    if (request == KVM_CHECK_EXTENSION && is_lacking((unsigned long)argument))
        return 0;
    if (request == KVM_RESET_DIRTY_RINGS) {
        look_at_signals();
        if (idle_resets()) {
            const char *error = getenv("IDLE_ERRNO");
            if (error)
                errno = atoi(error);
            return error ? -1 : 0;
        }
    }
    return next_ioctl(fd, request, argument);
}
