/* ioctl() as a preloaded library answers it: what includes this defines answer(), and may ask the next one. */
#ifndef _GNU_SOURCE
#error "define _GNU_SOURCE before the first header: RTLD_NEXT needs it"
#endif
#include <dlfcn.h>
#include <stdarg.h>

static int answer(int fd, unsigned long request, void *argument);

static int next_ioctl(int fd, unsigned long request, void *argument)
{
    static int (*next)(int, unsigned long, ...);

    if (!next)
        next = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
    return next(fd, request, argument);
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list list;
    void *argument;

    va_start(list, request);
    argument = va_arg(list, void *);
    va_end(list);
    return answer(fd, request, argument);
}
