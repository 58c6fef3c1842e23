/* Preloaded before libc: what other kernels say, and machines without memory.
 *
 * SCRIPT is a list of errno:out:pages, one for each UFFDIO_COPY, separated by commas; when it is used up, the kernel
 * answers. `pages` of the call are really placed first; out "-" leaves the field as the caller set it.
 *
 * REFUSE is a list of NAME:errno:first:calls, separated by commas: of the calls of that name (copy, zero, register, or
 * discard: MADV_DONTNEED, map: MAP_FIXED) so many fail, from that number on; calls 0: all from there on. A mapping that
 * fails has unmapped what was there, as POSIX allows, and somebody else has got the room: `theirs` says where.
 *
 * With WITHOUT_POISON set the kernel is older than Linux 6.6: it offers no UFFDIO_POISON, and calls it EINVAL.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "preloaded_ioctl.h"

/* Newer than the headers of some hosts. */
#define POISON_FEATURE (UINT64_C(1) << 14)
#define POISON_NUMBER 0x08

static const char *script;
static int started;

static int is_refused(const char *name, long *calls)
{
    const long call = __atomic_fetch_add(calls, 1, __ATOMIC_RELAXED);

    for (const char *rule = getenv("REFUSE"); rule && *rule; rule += strcspn(rule, ","), rule += *rule == ',') {
        const size_t length = strlen(name);
        int number = 0;
        long first = 0, count = 0;
        if (strncmp(rule, name, length) || sscanf(rule + length, ":%d:%ld:%ld", &number, &first, &count) != 3)
            continue;
        if (call >= first && (count == 0 || call < first + count)) {
            errno = number;
            return 1;
        }
    }
    return 0;
}

static int is_poison(unsigned long request)
{
    return _IOC_TYPE(request) == UFFDIO && _IOC_NR(request) == POISON_NUMBER;
}

/* In what the kernel says that it has. */
static void hide_poison(unsigned long request, void *argument)
{
    if (request == UFFDIO_API)
        ((struct uffdio_api *)argument)->features &= ~POISON_FEATURE;
    else if (request == UFFDIO_REGISTER)
        ((struct uffdio_register *)argument)->ioctls &= ~(UINT64_C(1) << POISON_NUMBER);
}

static int is_scripted(struct uffdio_copy *copy, int fd)
{
    int number = 0, pages = 0;
    char out[32] = "-";

    if (!started) {
        started = 1;
        script = getenv("SCRIPT");
    }
    if (!script || !*script)
        return 0;
    sscanf(script, "%d:%31[^:]:%d", &number, out, &pages);
    script = strchr(script, ',');
    if (script)
        script++;
    if (pages) {
        struct uffdio_copy some = *copy;
        some.len = (__u64)pages * 4096;
        if (next_ioctl(fd, UFFDIO_COPY, &some) != 0)
            abort();
    }
    if (strcmp(out, "-") != 0)
        copy->copy = atoll(out);
    errno = number;
    return 1;
}

static int answer(int fd, unsigned long request, void *argument)
{
    static long copies, zeros, registers;

    if (request == UFFDIO_COPY && (is_refused("copy", &copies) || is_scripted(argument, fd)))
        return -1;
    if (request == UFFDIO_ZEROPAGE && is_refused("zero", &zeros))
        return -1;
    if (request == UFFDIO_REGISTER && is_refused("register", &registers))
        return -1;
    if (getenv("WITHOUT_POISON") && is_poison(request)) {
        errno = EINVAL;
        return -1;
    }
    const int result = next_ioctl(fd, request, argument);
    if (getenv("WITHOUT_POISON"))
        hide_poison(request, argument);
    return result;
}

int madvise(void *address, size_t length, int advice)
{
    static int (*real)(void *, size_t, int);
    static long discards;

    if (!real)
        real = (int (*)(void *, size_t, int))dlsym(RTLD_NEXT, "madvise");
    if (advice == MADV_DONTNEED && is_refused("discard", &discards))
        return -1;
    return real(address, length, advice);
}

char *theirs;

void *mmap64(void *address, size_t length, int prot, int flags, int fd, off64_t offset)
{
    static void *(*real)(void *, size_t, int, int, int, off64_t);
    static long maps;

    if (!real)
        real = (void *(*)(void *, size_t, int, int, int, off64_t))dlsym(RTLD_NEXT, "mmap64");
    void *mapped = real(address, length, prot, flags, fd, offset);
    if (mapped == MAP_FAILED || !(flags & MAP_FIXED) || !is_refused("map", &maps))
        return mapped;
    theirs = memset(mapped, 'x', length);
    return MAP_FAILED;
}

/* Discards go one by one through the function above, where one of them may be refused. */
long syscall(long number, ...)
{
    static long (*real)(long, ...);
    long argument[6];
    va_list list;

    va_start(list, number);
    for (int at = 0; at < 6; at++)
        argument[at] = va_arg(list, long);
    va_end(list);
    if (!real)
        real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    if (number == SYS_process_madvise && getenv("REFUSE")) {
        errno = ENOSYS;
        return -1;
    }
    return real(number, argument[0], argument[1], argument[2], argument[3], argument[4], argument[5]);
}
