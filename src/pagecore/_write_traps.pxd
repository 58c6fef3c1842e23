from libc.stdint cimport uint64_t

from pagecore._uffd cimport Region, Userfaultfd


cdef class WriteTraps:
    """Memory that is write-protected through a descriptor of its own, and the thread that reads it.

    A subclass overrides c_run, which is nogil from end to end.
    """

    cdef Userfaultfd uffd
    cdef Region region
    cdef size_t size                # pages
    cdef bint c_fills               # missing pages are reported too; anonymous memory alone
    cdef uint64_t c_stopping        # the threads are to end
    cdef uint64_t c_error           # errno of what went wrong for good, or 0
    cdef const char *c_operation    # what that was
    cdef uint64_t c_where, c_length     # where, in bytes
    cdef uint64_t _released         # 1 while somebody is at it, 2 once it is done
    cdef uint64_t _failing, _running
    cdef object _memory             # keeps the buffer
    cdef int c_stop_fd              # readable once c_stopping is set
    cdef int _pagemap
    cdef int _process
    cdef list _threads

    cdef void c_run(self) noexcept nogil
    # PLACE_DONE, PLACE_AGAIN (an event waits; nothing was done) or what else _span.pxd knows. Both wake.
    cdef int c_unprotect(self, size_t first, size_t count) noexcept nogil
    # Zeros; protected, and then they cost memory, or without protection.
    cdef int c_fill(self, size_t page, bint protected) noexcept nogil
    cdef int c_protect(self, size_t first, size_t count) noexcept nogil
    # 0 or -errno: which pages of the run hold something, as bits from bit 0 on. `count` is at most 64.
    cdef int c_populated(self, size_t first, size_t count, uint64_t *bits) noexcept nogil
    # Sleeps until the descriptor is readable, c_stop_fd is, or the time is over (ns; -1: never). True: the first.
    cdef bint c_poll(self, long timeout_ns) noexcept nogil
    # Everybody goes on and nothing is protected any more when it returns, whoever else is at it. From any thread.
    cdef void c_release(self) noexcept nogil
    # The first failure is kept, and everybody let go.
    cdef void c_fail(self, int error, const char *operation, uint64_t where, uint64_t length) noexcept nogil
    cdef size_t c_page_of(self, uint64_t address) noexcept nogil
    cdef void c_ask_to_stop(self) noexcept nogil
    # Each body calls it first, without the GIL.
    cdef void c_started(self) noexcept nogil
    cdef int _raise_failure(self) except -1
