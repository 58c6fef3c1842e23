/* Preloaded before libc: a KVM that lacks a capability, or that is cut short by signals as it resets dirty rings.
 *
 * LACKING is a list of capabilities, separated by commas, that KVM_CHECK_EXTENSION denies. IDLE_RESETS is how many calls
 * of KVM_RESET_DIRTY_RINGS come to nothing first: Linux 6.16 says so where a signal is pending.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/ioctl.h>

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

int ioctl(int fd, unsigned long request, ...)
{
    static int (*real)(int, unsigned long, ...);
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (!real)
        real = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
    if (request == KVM_CHECK_EXTENSION && is_lacking((unsigned long)argument))
        return 0;
    if (request == KVM_RESET_DIRTY_RINGS && idle_resets())
        return 0;
    return real(fd, request, argument);
}
