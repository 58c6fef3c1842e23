from libc.stdint cimport uint64_t

from pagecore.dirty_log._protocol cimport DirtyLog


cdef class KvmSlotLog(DirtyLog):
    cdef readonly int slot
    cdef readonly bint enabled
    cdef int _fd                    # our own duplicate of the VM's descriptor (D13); -1 once closed
    cdef uint64_t _guest_address
    cdef uint64_t _host_address
    cdef uint64_t *_fetched         # what KVM overwrites (S11), or the reaps of a ring leave for the collect
    cdef uint64_t _busy             # a collect, a re-arm, a change of the slot or a close is under way

    # Hooks: before logging is switched on; after it was switched off, or could not be switched on; before a close.
    cdef int _before_logging(self) except -1
    cdef int _after_logging(self) except -1
    cdef int _before_close(self) except -1
    cdef int _end_manual_protect(self) except -1
    cdef int _set_logging(self, bint on) except -1
    # 0, or -errno where something else is under way or the log is closed or off; then c_end.
    cdef int c_begin(self) noexcept nogil
    cdef void c_end(self) noexcept nogil
    # KVM_GET_DIRTY_LOG into _fetched.
    cdef int c_get(self) noexcept nogil


cdef class KvmDirtyLog(KvmSlotLog):
    cdef int c_collect_into(self, uint64_t *words) noexcept nogil


cdef class KvmManualDirtyLog(KvmSlotLog):
    cdef readonly bint initially_set
    cdef uint64_t *_seen            # S11: what a collect has handed over and no re-arm has used

    cdef int c_collect_into(self, uint64_t *words) noexcept nogil
    cdef int c_rearm(self, size_t first, size_t count) noexcept nogil
    cdef int c_rearm_seen(self, size_t first, size_t count, const uint64_t *words) noexcept nogil
    cdef int c_clear(self, size_t first, size_t count, const uint64_t *words) noexcept nogil
