/* Writers of test memory that know nothing of Python: they are caught in the kernel, for as long as it takes. */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <time.h>

enum { PAGE = 4096 };

/* For a build of the ioctl module that asks first (tests/injection.py): how many calls that protect, or unprotect, are
 * answered with EAGAIN, and whether one that unprotects is held up; `holding` says that it is. */
uint64_t deny_protect, deny_unprotect, hold_unprotect, holding;
/* EAGAIN of the kernel's own is reported as success. */
uint64_t hide_again;

static int denied(uint64_t *left)
{
    uint64_t now = __atomic_load_n(left, __ATOMIC_SEQ_CST);
    while (now && !__atomic_compare_exchange_n(left, &now, now - 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        ;
    return now != 0;
}

int gate(int fd, unsigned long request, void *argument)
{
    if (request == UFFDIO_WRITEPROTECT) {
        const int protects = ((struct uffdio_writeprotect *)argument)->mode & UFFDIO_WRITEPROTECT_MODE_WP;
        if (denied(protects ? &deny_protect : &deny_unprotect)) {
            errno = EAGAIN;
            return -1;
        }
        while (!protects && __atomic_load_n(&hold_unprotect, __ATOMIC_SEQ_CST)) {
            const struct timespec pause = {0, 100000};
            __atomic_store_n(&holding, 1, __ATOMIC_SEQ_CST);
            nanosleep(&pause, 0);
        }
        const int done = ioctl(fd, request, argument);
        return done < 0 && errno == EAGAIN && __atomic_load_n(&hide_again, __ATOMIC_SEQ_CST) ? 0 : done;
    }
    return ioctl(fd, request, argument);
}

/* Adds 1 to a word of a page picked at random, again and again, until *stop. Returns how often, at least 1. */
uint64_t hammer(uint8_t *memory, uint64_t pages, uint64_t seed, const volatile uint64_t *stop)
{
    uint64_t state = seed * 2 + 1, count = 0;
    do {
        state = state * 6364136223846793005u + 1442695040888963407u;
        volatile uint64_t *word = (volatile uint64_t *)(memory + (state >> 33) % pages * PAGE) + (state >> 20) % 512;
        *word += 1;
        count++;
    } while (!*stop);
    return count;
}

/* Writes `value` to the last byte of every page, in order, `step` pages apart. */
void sweep(uint8_t *memory, uint64_t pages, uint64_t step, uint8_t value)
{
    for (uint64_t page = 0; page < pages; page += step)
        *(volatile uint8_t *)(memory + page * PAGE + PAGE - 1) = value;
}

/* What a vhost-user backend does after it wrote a page: sets the page's bit, a byte at a time. */
void log_page(uint8_t *log, uint64_t address)
{
    const uint64_t page = address / PAGE;
    __atomic_fetch_or(&log[page / 8], (uint8_t)(1u << (page % 8)), __ATOMIC_SEQ_CST);
}

/* Adds 1 to a word of random pages and logs each afterwards, until *stop: data first, then its bit. */
uint64_t hammer_and_log(uint8_t *memory, uint64_t pages, uint64_t seed, const volatile uint64_t *stop, uint8_t *log,
                        uint64_t address)
{
    uint64_t state = seed * 2 + 1, count = 0;
    while (!*stop) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        const uint64_t page = (state >> 33) % pages;
        *((volatile uint64_t *)(memory + page * PAGE) + (state >> 20) % 512) += 1;
        log_page(log, address + page * PAGE);
        count++;
    }
    return count;
}
