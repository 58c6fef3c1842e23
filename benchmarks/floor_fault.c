/* The floor of bench_fault.py: the least that serves faults, and threads that provoke them.
 *
 * The handler is what the manual page of userfaultfd shows: poll, read one message, COPY one page. It keeps no record of
 * anything, cannot meet a discard, and stops the process of whoever gives it a surprise. Built by conftest.py on its own with
 * -O2, and called through ctypes, which releases the GIL.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096 };

struct handler {
    pthread_t thread;
    int fd, stop;
    uint64_t base, source;
};

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void *serve(void *argument)
{
    struct handler *self = argument;
    for (;;) {
        struct pollfd waits[2] = {{.fd = self->fd, .events = POLLIN}, {.fd = self->stop, .events = POLLIN}};
        struct uffd_msg message;
        if (poll(waits, 2, -1) < 0 && errno != EINTR)
            abort();
        if (waits[1].revents)
            return NULL;
        if (read(self->fd, &message, sizeof message) != sizeof message)
            continue;
        const uint64_t page = message.arg.pagefault.address & ~(uint64_t)(PAGE - 1);
        struct uffdio_copy copy = {.dst = page, .src = self->source + (page - self->base), .len = PAGE};
        if (ioctl(self->fd, UFFDIO_COPY, &copy) != 0 && errno != EEXIST)
            abort();
    }
}

/* It inherits the processors that the caller may run on. */
void *floor_start(int fd, uint64_t base, uint64_t source)
{
    struct handler *self = malloc(sizeof *self);
    if (!self)
        return NULL;
    *self = (struct handler){.fd = fd, .stop = eventfd(0, EFD_CLOEXEC), .base = base, .source = source};
    if (self->stop < 0 || pthread_create(&self->thread, NULL, serve, self) != 0)
        abort();
    return self;
}

void floor_stop(void *handler)
{
    struct handler *self = handler;
    const uint64_t one = 1;
    if (write(self->stop, &one, sizeof one) != sizeof one)
        abort();
    pthread_join(self->thread, NULL);
    close(self->stop);
    free(self);
}

/* Read a byte of each page in the order given; the nanoseconds that each took. */
void floor_touch(uint64_t base, const uint32_t *order, size_t n, uint32_t *took)
{
    for (size_t i = 0; i < n; i++) {
        const uint64_t before = now_ns();
        (void)*(const volatile uint8_t *)(base + (uint64_t)order[i] * PAGE);
        took[i] = (uint32_t)(now_ns() - before);
    }
}

struct slice {
    pthread_t thread;
    pthread_barrier_t *barrier;
    uint64_t base;
    const uint32_t *order;
    size_t n;
};

static void *touch_slice(void *argument)
{
    struct slice *self = argument;
    pthread_barrier_wait(self->barrier);
    for (size_t i = 0; i < self->n; i++)
        (void)*(const volatile uint8_t *)(self->base + (uint64_t)self->order[i] * PAGE);
    return NULL;
}

/* The same from several threads, each with its share of the order; the nanoseconds of all together. */
uint64_t floor_touch_together(uint64_t base, const uint32_t *order, size_t n, size_t threads)
{
    struct slice slices[64];
    pthread_barrier_t barrier;
    if (threads > 64 || pthread_barrier_init(&barrier, NULL, (unsigned)threads + 1) != 0)
        abort();
    for (size_t i = 0; i < threads; i++) {
        slices[i] = (struct slice){.barrier = &barrier, .base = base, .order = order + i * (n / threads), .n = n / threads};
        if (pthread_create(&slices[i].thread, NULL, touch_slice, &slices[i]) != 0)
            abort();
    }
    pthread_barrier_wait(&barrier);
    const uint64_t before = now_ns();
    for (size_t i = 0; i < threads; i++)
        pthread_join(slices[i].thread, NULL);
    const uint64_t took = now_ns() - before;
    pthread_barrier_destroy(&barrier);
    return took;
}
