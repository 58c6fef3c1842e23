from libc.stdint cimport uint64_t


cdef class DirtyLog:
    """Whatever records writes to one region. Subclass it in Cython (c_ methods) or in Python (def methods)."""

    cdef readonly size_t size                   # pages
    cdef readonly bint rearms_at_collect        # S3: fetching and re-arming are one step
    cdef readonly frozenset misses              # S12: writers that this log cannot see
    # Both return a count or 0, or -errno. `words` is the caller's private buffer: bits are OR-ed into it
    # (S11).
    cdef int c_collect_into(self, uint64_t *words) noexcept nogil
    cdef int c_rearm(self, size_t first, size_t count) noexcept nogil
    # Re-arms the pages whose bits are 1 in `words`, which begins at log page `first`, a multiple of 64; `count` is one
    # too, or reaches the end (S11). All of them or, with -errno, none.
    cdef int c_rearm_seen(self, size_t first, size_t count, const uint64_t *words) noexcept nogil
    # Before each call from Python: raises where the log is closed, or off.
    cdef int _check(self) except -1
    # Raises what stands for an errno of the c_ methods.
    cdef int _fail(self, int number, str method) except -1
