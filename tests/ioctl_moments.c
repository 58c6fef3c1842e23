/* What a process needs that acts between the kernel calls of a dirty log (tests/lost_write_rig.py), by LD_PRELOAD: the
 * library under test is the one that is shipped, and the kernel's answers are its own.
 *
 * - ioctl(): before and after each call whose number is watched, on the thread that asked for it, a callback runs.
 * - Threads that write one word when told to, and say how far they are: a write may have to wait for the handler of a
 *   log by write-protection, which may have to wait for the thread that told them.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <semaphore.h>
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

#include "preloaded_ioctl.h"

static const unsigned long *numbers;
static size_t count;
static void (*callback)(unsigned long request, int done);
static pthread_t watched;

void watch(const unsigned long *requests, size_t n, void (*at)(unsigned long, int))
{
    watched = pthread_self();
    numbers = requests;
    callback = at;
    count = n;
}

static int answer(int fd, unsigned long request, void *argument)
{
    size_t at = 0;
    int result;

    while (at < count && numbers[at] != request)
        at++;
    if (at == count || !pthread_equal(watched, pthread_self()))
        return next_ioctl(fd, request, argument);
    callback(request, 0);
    result = next_ioctl(fd, request, argument);
    callback(request, 1);
    return result;
}

/* One write at a time; the fields are read by whoever tells it to. */
struct writer {
    uint64_t *where;
    uint64_t value;
    int32_t thread;
    int32_t state;      /* of the write: 0 none yet, 1 begun, 2 done */
    sem_t told;
};

enum { BEGUN = 1, DONE = 2 };

static void *write_when_told(void *argument)
{
    struct writer *writer = argument;

    __atomic_store_n(&writer->thread, (int32_t)gettid(), __ATOMIC_RELEASE);
    for (;;) {
        while (sem_wait(&writer->told))
            ;
        __atomic_store_n(&writer->state, BEGUN, __ATOMIC_RELEASE);
        __atomic_store_n(writer->where, writer->value, __ATOMIC_RELEASE);
        __atomic_store_n(&writer->state, DONE, __ATOMIC_RELEASE);
    }
    return NULL;
}

/* The thread lives as long as the process, and so does `writer`. */
int start_writer(struct writer *writer)
{
    pthread_t thread;

    return sem_init(&writer->told, 0, 0) || pthread_create(&thread, NULL, write_when_told, writer);
}

void tell_writer(struct writer *writer, uint64_t *where, uint64_t value)
{
    writer->where = where;
    writer->value = value;
    __atomic_store_n(&writer->state, 0, __ATOMIC_RELEASE);
    sem_post(&writer->told);
}
