from libc.stdint cimport uint64_t

from pagecore.dirty_log._protocol cimport DirtyLog


cdef class KvmDirtyLog(DirtyLog):
    cdef readonly int slot
    cdef readonly bint enabled
    cdef int _fd                    # our own duplicate of the VM's descriptor (D13); -1 once closed
    cdef uint64_t _guest_address
    cdef uint64_t _host_address
    cdef uint64_t *_fetched         # what KVM overwrites (S11)
    cdef uint64_t _busy             # a collect, a change of the slot or a close is under way

    cdef int _set_logging(self, bint on) except -1
    cdef int c_collect_into(self, uint64_t *words) noexcept nogil
    cdef int c_rearm(self, size_t first, size_t count) noexcept nogil
