/* The floor rows of bench_place.py: the bare ioctls in a loop, with the least that a caller must know.
 *
 * Built by conftest.py on its own with -O2, and called through ctypes (which releases the GIL, as pagecore does).
 */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>

/* Place `length` bytes, `chunk` bytes a call; returns the bytes placed. */
size_t floor_copy(int fd, uint64_t to, uint64_t from, size_t length, size_t chunk)
{
    size_t done = 0;
    while (done < length) {
        struct uffdio_copy copy = {.dst = to + done, .src = from + done, .len = chunk};
        if (ioctl(fd, UFFDIO_COPY, &copy) != 0)
            break;
        done += chunk;
    }
    return done;
}

size_t floor_zero(int fd, uint64_t to, size_t length, size_t chunk)
{
    size_t done = 0;
    while (done < length) {
        struct uffdio_zeropage zero = {.range = {.start = to + done, .len = chunk}};
        if (ioctl(fd, UFFDIO_ZEROPAGE, &zero) != 0)
            break;
        done += chunk;
    }
    return done;
}

/* Copies of present pages, one a call: the kernel allocates and copies each before it finds out; then the wake. */
size_t floor_lose(int fd, uint64_t to, uint64_t from, size_t length, size_t page)
{
    size_t lost = 0;
    for (size_t done = 0; done < length; done += page) {
        struct uffdio_copy copy = {.dst = to + done, .src = from + done, .len = page};
        struct uffdio_range range = {.start = to + done, .len = page};
        if (ioctl(fd, UFFDIO_COPY, &copy) != -1 || errno != EEXIST || ioctl(fd, UFFDIO_WAKE, &range) != 0)
            break;
        lost += page;
    }
    return lost;
}
