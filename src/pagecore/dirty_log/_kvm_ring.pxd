from libc.stdint cimport int64_t, uint64_t

from pagecore.dirty_log._kvm cimport KvmSlotLog


cdef class KvmDirtyRing:
    cdef void *_ring                # struct pagecore_ring of _kvm_ring.h; lives as long as this object
    cdef int _process               # whose VM it is: KVM resets nothing for a forked child, which would take the entries away

    # Takes what all rings hold and re-arms it, for the collects that follow: what a vCPU's thread calls when it left
    # with KVM_EXIT_DIRTY_RING_FULL. Returns the entries taken, or -errno.
    cdef int64_t c_reap(self) noexcept nogil


cdef class KvmRingDirtyLog(KvmSlotLog):
    cdef readonly KvmDirtyRing ring
    cdef void *_entry               # struct pagecore_ring_slot, known to the ring while logging is on

    cdef int c_collect_into(self, uint64_t *words) noexcept nogil
