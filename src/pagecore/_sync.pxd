# _sync.h. Not for consumers: they have no include path to the headers.
from libc.stdint cimport uint64_t

cdef extern from "_sync.h" nogil:
    ctypedef struct pagecore_place_lock:
        pass
    int pagecore_place_lock_init(pagecore_place_lock *lock)
    void pagecore_place_lock_destroy(pagecore_place_lock *lock)
    void pagecore_lock_shared(pagecore_place_lock *lock)
    void pagecore_lock_exclusive(pagecore_place_lock *lock)
    void pagecore_unlock(pagecore_place_lock *lock)

    ctypedef struct pagecore_monitor:
        pass
    int pagecore_monitor_init(pagecore_monitor *monitor)
    void pagecore_monitor_destroy(pagecore_monitor *monitor)
    void pagecore_monitor_enter(pagecore_monitor *monitor)
    void pagecore_monitor_leave(pagecore_monitor *monitor)
    void pagecore_monitor_notify(pagecore_monitor *monitor)
    int pagecore_monitor_wait(pagecore_monitor *monitor, uint64_t deadline_ns)
    uint64_t pagecore_now_ns()

    ctypedef struct pagecore_fair_lock:
        pass
    int pagecore_fair_lock_init(pagecore_fair_lock *lock)
    void pagecore_fair_lock_destroy(pagecore_fair_lock *lock)
    void pagecore_fair_acquire(pagecore_fair_lock *lock)
    void pagecore_fair_release(pagecore_fair_lock *lock)
