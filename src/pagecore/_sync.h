/* Locks and clocks for threads that run without the GIL. Atomics stand in _atomic.h. */
#ifndef PAGECORE_SYNC_H
#define PAGECORE_SYNC_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stdint.h>
#include <time.h>

/* The lock of design rule D5. Placers hold the shared side for one ioctl at a time; the reader of the descriptor takes the
 * exclusive side, and goes first: with a fair or a shared-first lock a stream of placers would starve it, and with it the
 * guest thread that waits for its discard to be read. glibc calls that "prefer writer"; elsewhere the default has to do. */
typedef struct {
    pthread_rwlock_t lock;
} pagecore_place_lock;

static inline int pagecore_place_lock_init(pagecore_place_lock *self)
{
    pthread_rwlockattr_t attributes;
    int error = pthread_rwlockattr_init(&attributes);
    if (error)
        return error;
#ifdef __GLIBC__
    error = pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
#endif
    if (!error)
        error = pthread_rwlock_init(&self->lock, &attributes);
    pthread_rwlockattr_destroy(&attributes);
    return error;
}

static inline void pagecore_place_lock_destroy(pagecore_place_lock *self)
{
    pthread_rwlock_destroy(&self->lock);
}

static inline void pagecore_lock_shared(pagecore_place_lock *self)
{
    pthread_rwlock_rdlock(&self->lock);
}

static inline void pagecore_lock_exclusive(pagecore_place_lock *self)
{
    pthread_rwlock_wrlock(&self->lock);
}

static inline void pagecore_unlock(pagecore_place_lock *self)
{
    pthread_rwlock_unlock(&self->lock);
}

static inline uint64_t pagecore_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* A mutex with one condition whose waits end at a point of CLOCK_MONOTONIC. */
typedef struct {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
} pagecore_monitor;

static inline int pagecore_monitor_init(pagecore_monitor *self)
{
    pthread_condattr_t attributes;
    int error = pthread_condattr_init(&attributes);
    if (error)
        return error;
    error = pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    if (!error)
        error = pthread_cond_init(&self->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    if (!error) {
        error = pthread_mutex_init(&self->mutex, NULL);
        if (error)
            pthread_cond_destroy(&self->changed);
    }
    return error;
}

static inline void pagecore_monitor_destroy(pagecore_monitor *self)
{
    pthread_cond_destroy(&self->changed);
    pthread_mutex_destroy(&self->mutex);
}

static inline void pagecore_monitor_enter(pagecore_monitor *self)
{
    pthread_mutex_lock(&self->mutex);
}

static inline void pagecore_monitor_leave(pagecore_monitor *self)
{
    pthread_mutex_unlock(&self->mutex);
}

static inline void pagecore_monitor_notify(pagecore_monitor *self)
{
    pthread_cond_broadcast(&self->changed);
}

/* Inside the monitor: sleeps until a notification or the deadline (0 when notified, ETIMEDOUT at the deadline). */
static inline int pagecore_monitor_wait(pagecore_monitor *self, uint64_t deadline_ns)
{
    struct timespec when;
    when.tv_sec = (time_t)(deadline_ns / 1000000000u);
    when.tv_nsec = (long)(deadline_ns % 1000000000u);
    return pthread_cond_timedwait(&self->changed, &self->mutex, &when);
}

/* A lock that is handed over in the order of arrival. Whoever works in bounded pieces and takes it again at once would
 * keep it for ever with a plain mutex: those who sleep on that are never fast enough. */
typedef struct {
    pthread_mutex_t mutex;
    pthread_cond_t turn;
    uint64_t next;      /* the ticket of whoever comes next */
    uint64_t serving;   /* the ticket that holds the lock */
} pagecore_fair_lock;

static inline int pagecore_fair_lock_init(pagecore_fair_lock *self)
{
    int error = pthread_mutex_init(&self->mutex, NULL);
    if (error)
        return error;
    error = pthread_cond_init(&self->turn, NULL);
    if (error)
        pthread_mutex_destroy(&self->mutex);
    self->next = self->serving = 0;
    return error;
}

static inline void pagecore_fair_lock_destroy(pagecore_fair_lock *self)
{
    pthread_cond_destroy(&self->turn);
    pthread_mutex_destroy(&self->mutex);
}

static inline void pagecore_fair_acquire(pagecore_fair_lock *self)
{
    pthread_mutex_lock(&self->mutex);
    const uint64_t mine = self->next++;
    while (self->serving != mine)
        pthread_cond_wait(&self->turn, &self->mutex);
    pthread_mutex_unlock(&self->mutex);
}

static inline void pagecore_fair_release(pagecore_fair_lock *self)
{
    pthread_mutex_lock(&self->mutex);
    const int waited_for = ++self->serving != self->next;
    /* Each waits for a number of its own, and few ever wait: waking all of them is enough. */
    if (waited_for)
        pthread_cond_broadcast(&self->turn);
    pthread_mutex_unlock(&self->mutex);
}

#endif
