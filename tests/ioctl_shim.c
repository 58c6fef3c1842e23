/* Preloaded before libc: answers UFFDIO_COPY by a script, so that tests see what other kernels say.
 *
 * SCRIPT is a list of errno:out:pages, one for each call, separated by commas; when it is used up, the kernel answers.
 * `pages` of the call are really placed first; out "-" leaves the field as the caller set it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

static const char *script;
static int started;

int ioctl(int fd, unsigned long request, ...)
{
    static int (*real)(int, unsigned long, ...);
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (!real)
        real = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
    if (!started) {
        started = 1;
        script = getenv("SCRIPT");
    }
    if (request != UFFDIO_COPY || !script || !*script)
        return real(fd, request, argument);

    int number = 0, pages = 0;
    char out[32] = "-";
    sscanf(script, "%d:%31[^:]:%d", &number, out, &pages);
    script = strchr(script, ',');
    if (script)
        script++;
    struct uffdio_copy *copy = argument;
    if (pages) {
        struct uffdio_copy some = *copy;
        some.len = (__u64)pages * 4096;
        if (real(fd, request, &some) != 0)
            abort();
    }
    if (strcmp(out, "-") != 0)
        copy->copy = atoll(out);
    errno = number;
    return -1;
}
