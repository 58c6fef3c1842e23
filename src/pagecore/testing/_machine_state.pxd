from libc.stdint cimport uint32_t, uint64_t

from pagecore._bitmap cimport Bitmap
from pagecore.dirty_log._kvm_ring cimport KvmDirtyRing
from pagecore.testing._machine cimport pagecore_control, pagecore_machine, pagecore_vcpu


cdef class MachineState:
    """What a Machine is to native code. The c_ methods are nogil, need an open machine and trust their arguments."""

    cdef pagecore_machine *_machine     # NULL once closed
    cdef Py_buffer _view
    cdef bint _held                     # the view is ours to release
    cdef Bitmap _dirty
    cdef KvmDirtyRing _ring             # whose rings full vCPUs reap
    cdef readonly size_t npages
    cdef uint64_t _running              # calls under way without the GIL; close() refuses while there are any

    cdef pagecore_machine *_open(self) except NULL
    # Around every stretch without the GIL.
    cdef pagecore_machine *_enter(self) except NULL
    cdef void _leave(self) noexcept nogil
    cdef pagecore_vcpu *_vcpu(self, object number) except NULL

    # Until there is something for Python; returns PAGECORE_RUN_*. One thread for each vCPU.
    cdef int c_run(self, pagecore_vcpu *vcpu) noexcept nogil
    # Times in ns. Not 0 where the time ran out; *at is CLOCK_MONOTONIC of the last (first) guest instruction.
    cdef int c_pause(self, uint64_t timeout, uint64_t *at) noexcept nogil
    cdef int c_resume(self, uint64_t timeout, uint64_t *at) noexcept nogil
    cdef bint c_wait_stopped(self, uint64_t timeout) noexcept nogil
    cdef void c_quit(self) noexcept nogil
    cdef void c_throttle(self, double share) noexcept nogil
    cdef void c_announce(self, uint64_t command) noexcept nogil
    # Returns how many pages it wrote: their numbers, at most PAGECORE_MAX_VCPUS.
    cdef uint32_t c_stop_after(self, uint64_t steps, uint64_t *written) noexcept nogil
    cdef void c_seen(self, uint32_t number, pagecore_control *control) noexcept nogil
