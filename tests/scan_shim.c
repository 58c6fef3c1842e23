/* Preloaded before libc: answers PAGEMAP_SCAN and PROCMAP_QUERY as other kernels and unlucky moments do. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "preloaded_ioctl.h"

#define PAGEMAP_SCAN 0xC0606610ul
#define PROCMAP_QUERY 0xC0686611ul

/* Set by the test: 0 the kernel answers; 1 one scan does its work and is then interrupted; 2 there is no PAGEMAP_SCAN;
 * 3 there is no PROCMAP_QUERY; 4 a scan gets nowhere. */
int scan_mode;
/* How many scans there were. */
int scan_calls;

static int answer(int fd, unsigned long request, void *argument)
{
    scan_calls += request == PAGEMAP_SCAN;
    if ((scan_mode == 2 && request == PAGEMAP_SCAN) || (scan_mode == 3 && request == PROCMAP_QUERY)) {
        errno = ENOTTY;
        return -1;
    }
    int result = next_ioctl(fd, request, argument);
    if (request == PAGEMAP_SCAN && scan_mode == 1) {
        scan_mode = 0;
        errno = EINTR;
        return -1;
    }
    if (request == PAGEMAP_SCAN && scan_mode == 4) {
        unsigned long long *fields = argument;
        fields[4] = fields[2]; /* walk_end = start */
    }
    return result;
}
