from libc.stdint cimport uint64_t

from pagecore.dirty_log._protocol cimport DirtyLog


cdef class PagemapDirtyLog(DirtyLog):
    cdef readonly int pid
    cdef readonly uint64_t address
    cdef readonly size_t page_size
    cdef object _populated          # Bitmap: the pages that may have held something when the log was armed
    cdef object _uffd               # what keeps the memory registered; None where somebody else does
    cdef object _region             # what close() unregisters
    cdef void *_vector              # page regions, as the kernel writes them
    cdef int _pagemap               # /proc/PID/pagemap and maps: both of the memory, not of the number; -1 once closed
    cdef int _maps
    cdef int _process               # who made the log: a forked child would take the pages away from it
    cdef int _shift                 # page_size == 1 << _shift
    cdef uint64_t _busy             # a scan or a close is under way

    cdef int _open(self, object pid, object address, object length, object page_size, object marked,
                   object uffd) except -1
    cdef int _arm(self, bint shared) except -1
    cdef int _let_go(self) except -1
    cdef int _check_open(self) except -1
    # 0 or -errno. What was found is OR-ed into `words`; `words` NULL: nothing is reported, only re-armed.
    cdef int _scan(self, uint64_t start, uint64_t end, bint arming, uint64_t *words, uint64_t *newly) noexcept nogil
    # 1 and the first piece that is not mapped, 0 where there is none (or the kernel cannot tell), or -errno.
    cdef int _find_hole(self, uint64_t *first, uint64_t *past) noexcept nogil
    # The first memory that is not registered for asynchronous write-protection: the same.
    cdef int _find_stranger(self, uint64_t *first, uint64_t *past) noexcept nogil
    cdef object _explained(self, int number)
    cdef int c_collect_into(self, uint64_t *words) noexcept nogil
    cdef int c_rearm(self, size_t first, size_t count) noexcept nogil
