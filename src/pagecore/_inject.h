/* The ioctl() that userfaultfds are called with. A build with -DPAGECORE_INJECT puts answers of a script before the
 * kernel's (tests/injection.py makes one); in every other build this is ioctl() and nothing else.
 */
#ifndef PAGECORE_INJECT_H
#define PAGECORE_INJECT_H

#include <sys/ioctl.h>

#ifndef PAGECORE_INJECT

static inline int pagecore_ioctl(int fd, unsigned long request, void *argument)
{
    return ioctl(fd, request, argument);
}

#else

/* Set by the test through the symbol; NULL asks the kernel. */
__attribute__((visibility("default"))) int (*pagecore_injected_ioctl)(int fd, unsigned long request, void *argument);

static int pagecore_ioctl(int fd, unsigned long request, void *argument)
{
    return pagecore_injected_ioctl ? pagecore_injected_ioctl(fd, request, argument) : ioctl(fd, request, argument);
}

#endif
#endif
