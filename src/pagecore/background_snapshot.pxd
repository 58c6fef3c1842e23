cdef class BackgroundSnapshot:
    """An image of memory at one moment, saved while it is written to."""

    cdef readonly object memory     # None once closed
    cdef readonly size_t size       # pages
    cdef object _traps              # SnapshotTraps, which the threads hold too; None before it is open
    cdef object _sink               # keeps the buffer
    cdef int _fd                    # our duplicate of the file, or -1

    cdef int _close_sink(self) except -1
