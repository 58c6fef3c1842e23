"""KvmDirtyRing, the rings of all vCPUs of a VM, and KvmRingDirtyLog, what they say of one memory slot.

Facts that the code rests on, beside those of _kvm.pyx:

- A VM has rings or bitmaps, not both, and that is decided before its first vCPU. A vCPU's ring holds what it wrote in
  any slot; KVM_RESET_DIRTY_RINGS is for all rings. So there is one object for the rings, and one lock, and a reap for
  one slot leaves the pages of the others in pending words of their own.
- KVM leaves the guest with KVM_EXIT_DIRTY_RING_FULL while there still is room in the ring (soft-full), so nothing is
  lost; and leaves again at once as long as nobody reaps. The thread of that vCPU calls reap, and goes on.
- An entry is handed over by its flags: acquire before the other fields are read, release after. _kvm_ring.h.
- What a vCPU wrote since it last left the guest may not be in its ring yet (the processor keeps a buffer of its own).
  For the last collect, stop the vCPUs: KVM_RUN has returned.
- From Linux 6.16 on a signal that is pending cuts a reset short, and up to 64 pages that count as reset stay writable:
  signals are blocked meanwhile, and where a reset is cut short nevertheless, collects fail (_kvm_ring.h).
- With KVM_DIRTY_LOG_INITIALLY_SET pages would not be write-protected, and the rings never hear of them: enable()
  switches manual protection off.
"""

cimport cython
from libc.errno cimport E2BIG, EBADMSG, ECHILD, EEXIST, EINVAL, ENOMEM, EOPNOTSUPP, errno
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.unistd cimport getpid

from operator import index

from pagecore.dirty_log._kvm cimport KvmSlotLog

from pagecore.errors import BusyError, ClosedError, UnsupportedError, raise_for_errno


cdef extern from "_bitscan.h" nogil:
    size_t pagecore_drain_owned(uint64_t *source, uint64_t *words, size_t end)

cdef extern from "<fcntl.h>" nogil:
    enum: F_DUPFD_CLOEXEC
    int fcntl(int fd, int command, ...)

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)

cdef extern from "dirty_log/_kvm_ring.h" nogil:
    struct pagecore_ring_slot:
        uint32_t slot
        size_t npages
        uint64_t *pending
        int wrong
    struct pagecore_ring_vcpu:
        pass
    struct pagecore_ring:
        int vm_fd
        uint32_t entries
        uint32_t vcpus
        pagecore_ring_vcpu *vcpu
        pagecore_ring_slot **slot
        uint64_t foreign
    int pagecore_ring_init(pagecore_ring *ring)
    void pagecore_ring_enter(pagecore_ring *ring)
    void pagecore_ring_leave(pagecore_ring *ring)
    void pagecore_ring_destroy(pagecore_ring *ring)
    int pagecore_ring_switch_on(int vm_fd, uint32_t size)
    int pagecore_ring_map(pagecore_ring *ring, uint32_t number, int vcpu_fd)
    void pagecore_ring_unmap(pagecore_ring *ring)
    int64_t pagecore_ring_reap(pagecore_ring *ring)
    int64_t pagecore_ring_reap_locked(pagecore_ring *ring)
    int pagecore_ring_add(pagecore_ring *ring, pagecore_ring_slot *slot)
    void pagecore_ring_remove(pagecore_ring *ring, const pagecore_ring_slot *slot)

cdef enum:
    ENTRY = 16              # bytes
    SMALLEST = 4096
    LARGEST = 1 << 20       # KVM's own bound; a smaller one of this KVM comes back as E2BIG


cdef uint32_t size_of(object size) except 0:
    number = index(size)
    if not SMALLEST <= number <= LARGEST or number & (number - 1):
        raise ValueError(f"ring size {number} is no power of two in [{SMALLEST}, {LARGEST}]")
    return number


@cython.final
cdef class KvmDirtyRing:
    """KvmDirtyRing(vm_fd, vcpu_fds, size=65536)
    --

    The dirty rings of a VM: what each vCPU wrote, page by page (``KVM_CAP_DIRTY_LOG_RING``).

    A `KvmRingDirtyLog` for each memory slot hands the pages on. Whoever runs a vCPU calls :meth:`reap` (native code:
    ``c_reap``) when KVM_RUN leaves with KVM_EXIT_DIRTY_RING_FULL. Nobody else may reset the rings of this VM.

    Parameters
    ----------
    vm_fd : int
        The descriptor of the VM; it is duplicated.
    vcpu_fds : iterable of int
        The descriptors of all its vCPUs; their rings are mapped, and the descriptors not kept.
    size : int
        Bytes of each ring, as :meth:`switch_on` was given it: 16 for an entry.

    Attributes
    ----------
    entries : int
        Entries of each ring. KVM leaves the guest a little before all of them are used.
    vcpus : int
        Rings.
    foreign : int
        Entries that were dropped: of a slot without a log that is enabled, or of a page outside its slot. Collects of
        such a log fail, because the page that was meant is not watched any more.

    Raises
    ------
    UnsupportedError
        If the VM has no rings of this size.
    ValueError
        If the size is no power of two in [4096, 1048576], or there is no vCPU.
    UffdError
        If a descriptor cannot be duplicated, or a ring not mapped.

    Notes
    -----
    Thread-safe: one lock for everything, waited for without the GIL. In a forked child the lock is not taken, and nothing
    is reaped: close it there, at most.
    Linux 5.11 on x86; logs that need no rings: `KvmDirtyLog`, `KvmManualDirtyLog`.
    """

    def __cinit__(self, *args, **kwargs):
        cdef pagecore_ring *ring = <pagecore_ring *>calloc(1, sizeof(pagecore_ring))
        if ring == NULL:
            raise MemoryError()
        ring.vm_fd = -1
        if pagecore_ring_init(ring) != 0:
            free(ring)
            raise MemoryError("there is no lock to be had")
        self._ring = ring
        self._process = getpid()

    def __init__(self, vm_fd, vcpu_fds, size=65536):
        cdef pagecore_ring *ring = <pagecore_ring *>self._ring
        cdef int error, fd
        cdef uint32_t number
        if ring.entries:
            raise BusyError("this ring was opened before")
        cdef uint32_t nbytes = size_of(size)
        fds = [index(descriptor) for descriptor in vcpu_fds]
        if not fds:
            raise ValueError("a ring belongs to a vCPU: there is none")
        ring.vcpu = <pagecore_ring_vcpu *>calloc(len(fds), sizeof(pagecore_ring_vcpu))
        if ring.vcpu == NULL:
            raise MemoryError()
        ring.vcpus = <uint32_t>len(fds)
        ring.entries = nbytes // ENTRY
        for number in range(ring.vcpus):
            fd = fds[number]
            with nogil:
                error = pagecore_ring_map(ring, number, fd)
            if error == -EOPNOTSUPP:
                raise UnsupportedError(
                    f"a dirty ring of {nbytes} bytes for vCPU {number}",
                    "KvmDirtyRing.switch_on() with that size comes before the first vCPU",
                )
            if error:
                raise_for_errno(-error, f"mmap of the dirty ring of vCPU {number}")
        ring.vm_fd = fcntl(index(vm_fd), F_DUPFD_CLOEXEC, 0)
        if ring.vm_fd < 0:
            raise_for_errno(errno, "F_DUPFD_CLOEXEC of a VM")

    def __dealloc__(self):
        cdef pagecore_ring *ring = <pagecore_ring *>self._ring
        if ring == NULL:
            return
        pagecore_ring_unmap(ring)
        if ring.vm_fd >= 0:
            c_close(ring.vm_fd)
        pagecore_ring_destroy(ring)
        free(ring.slot)
        free(ring)

    @staticmethod
    def switch_on(vm_fd, size=65536):
        """switch_on(vm_fd, size=65536)
        --

        Give every vCPU that this VM will have a dirty ring: after KVM_CREATE_VM, before the first KVM_CREATE_VCPU.

        Parameters
        ----------
        vm_fd : int
        size : int
            Bytes of each ring, a power of two from 4096 to 1048576; 16 for an entry. Small rings make the guest leave
            more often, large ones take longer to reap.

        Raises
        ------
        UnsupportedError
            If this KVM has no rings, or it is too late for this VM.
        ValueError
            If the size is out of bounds.
        UffdError
            If KVM refused.

        Notes
        -----
        Releases the GIL. Thread-safe. Linux 5.11 on x86.
        """
        cdef uint32_t nbytes = size_of(size)
        cdef int fd = index(vm_fd), error
        with nogil:
            error = pagecore_ring_switch_on(fd, nbytes)
        if error == -EOPNOTSUPP:
            raise UnsupportedError("KVM_CAP_DIRTY_LOG_RING", "Linux 5.11 or newer on x86; KvmDirtyLog does without")
        if error == -EINVAL:
            raise UnsupportedError(
                "KVM_CAP_DIRTY_LOG_RING for this VM", "call switch_on() once, before the first vCPU is created"
            )
        if error == -E2BIG:
            raise ValueError(f"ring size {nbytes} is more than this KVM allows")
        if error:
            raise_for_errno(-error, "KVM_ENABLE_CAP of KVM_CAP_DIRTY_LOG_RING")

    @property
    def entries(self):
        return (<pagecore_ring *>self._ring).entries

    @property
    def vcpus(self):
        return (<pagecore_ring *>self._ring).vcpus

    @property
    def foreign(self):
        cdef pagecore_ring *ring = <pagecore_ring *>self._ring
        cdef uint64_t foreign
        with nogil:
            pagecore_ring_enter(ring)
            foreign = ring.foreign
            pagecore_ring_leave(ring)
        return foreign

    @property
    def closed(self):
        """bool: whether :meth:`close` was called."""
        cdef pagecore_ring *ring = <pagecore_ring *>self._ring
        cdef bint closed
        with nogil:
            pagecore_ring_enter(ring)
            closed = ring.vm_fd < 0
            pagecore_ring_leave(ring)
        return closed

    def reap(self):
        """reap()
        --

        Take what all rings hold, and re-arm those pages; the next collects of the logs hand them on.

        Returns
        -------
        int
            Entries taken; 0 where somebody else was faster.

        Raises
        ------
        ClosedError
        UffdError
            If KVM refused to reset the rings. Nothing is handed on before a later reap or collect has done it.

        Notes
        -----
        Releases the GIL.
        Thread-safe with everything; native vCPU threads call ``c_reap``.
        KVM_RESET_DIRTY_RINGS, Linux 5.11.
        """
        cdef int64_t taken
        with nogil:
            taken = self.c_reap()
        if taken == -ECHILD:
            raise UnsupportedError(f"the dirty ring of process {self._process} in its child", "only that may reap its VM")
        if self.closed:
            raise ClosedError("this ring is closed")
        if taken < 0:
            raise_for_errno(<int>-taken, "KVM_RESET_DIRTY_RINGS")
        return taken

    def close(self):
        """close()
        --

        Unmap the rings and let go of the VM; its logs are closed with it. Idempotent.

        Notes
        -----
        Releases the GIL: it waits for a reap under way.
        Thread-safe with everything; a vCPU that still runs has nobody to reap its ring.
        Needs no kernel interface.
        """
        cdef pagecore_ring *ring = <pagecore_ring *>self._ring
        with nogil:
            pagecore_ring_enter(ring)
            if ring.vm_fd >= 0:
                pagecore_ring_unmap(ring)
                c_close(ring.vm_fd)
                ring.vm_fd = -1
            pagecore_ring_leave(ring)

    def __repr__(self):
        return f"<KvmDirtyRing of {self.vcpus} vCPUs, {self.entries} entries each>"

    cdef int64_t c_reap(self) noexcept nogil:
        if getpid() != self._process:
            return -ECHILD
        return pagecore_ring_reap(<pagecore_ring *>self._ring)


# Its destructor needs the ring.
@cython.no_gc_clear
@cython.final
cdef class KvmRingDirtyLog(KvmSlotLog):
    """KvmRingDirtyLog(ring, size, *, host_address, guest_address=0, slot=0)
    --

    What the dirty rings of a VM say of one memory slot.

    It re-arms at collect and misses what the VMM writes (``misses == {"vmm"}``). Logging is off until :meth:`enable`. A
    collect reaps all rings and re-arms the pages before it hands any on (S2); those of other slots wait for the
    collects of their logs. Cost follows what was written and not the size of memory.

    A collect raises `ProtocolError` from the moment that a page may have been left unwatched until :meth:`disable` and
    :meth:`enable`, after which every page is owed: an entry named a page outside its slot, or a reset was cut short
    (Linux 6.16 and newer: SIGSTOP, a debugger, the freezer, io_uring's task work; other signals are blocked meanwhile).
    Where one of these strikes right after the last entry, the reset looks complete, and nobody can tell: keep them away
    from threads that collect or reap.

    Parameters
    ----------
    ring : KvmDirtyRing
    size, host_address, guest_address, slot
        As `KvmSlotLog` has them, like attributes and errors.

    Attributes
    ----------
    ring : KvmDirtyRing
    """

    def __init__(self, KvmDirtyRing ring not None, size, *, host_address, guest_address=0, slot=0):
        cdef pagecore_ring *rings = <pagecore_ring *>ring._ring
        cdef pagecore_ring_slot *entry
        if ring.closed:
            raise ClosedError("this ring is closed")
        KvmSlotLog.__init__(
            self, rings.vm_fd, size, host_address=host_address, guest_address=guest_address, slot=slot
        )
        if ring.closed:
            raise ClosedError("this ring is closed")    # and the descriptor that was duplicated may be another one
        entry = <pagecore_ring_slot *>calloc(1, sizeof(pagecore_ring_slot))
        if entry == NULL:
            raise MemoryError()
        entry.slot = self.slot
        entry.npages = self.size
        entry.pending = self._fetched
        self._entry = entry
        self.ring = ring

    def __dealloc__(self):
        if self._entry != NULL:
            pagecore_ring_remove(<pagecore_ring *>self.ring._ring, <pagecore_ring_slot *>self._entry)
            free(self._entry)

    cdef int _before_logging(self) except -1:
        cdef pagecore_ring *ring = <pagecore_ring *>self.ring._ring
        cdef pagecore_ring_slot *entry = <pagecore_ring_slot *>self._entry
        cdef int error
        self._end_manual_protect()
        with nogil:
            error = pagecore_ring_add(ring, entry)
        if error == -EEXIST:
            raise BusyError(f"slot {self.slot} has another log of these rings, which is enabled")
        if error == -ENOMEM:
            raise MemoryError()
        if error:
            raise ClosedError("the ring of this log is closed")
        return 0

    cdef int _after_logging(self) except -1:
        cdef pagecore_ring *ring = <pagecore_ring *>self.ring._ring
        cdef pagecore_ring_slot *entry = <pagecore_ring_slot *>self._entry
        with nogil:
            # What is left in the rings would otherwise be found when logging begins again.
            self.ring.c_reap()
            pagecore_ring_remove(ring, entry)
            memset(entry.pending, 0, (self.size + 63) // 64 * sizeof(uint64_t))
            entry.wrong = 0
        return 0

    cdef int _before_close(self) except -1:
        cdef pagecore_ring *ring = <pagecore_ring *>self.ring._ring
        cdef pagecore_ring_slot *entry = <pagecore_ring_slot *>self._entry
        with nogil:
            pagecore_ring_remove(ring, entry)
        return 0

    cdef int c_collect_into(self, uint64_t *words) noexcept nogil:
        cdef pagecore_ring *ring = <pagecore_ring *>self.ring._ring
        cdef pagecore_ring_slot *entry = <pagecore_ring_slot *>self._entry
        cdef size_t newly = 0
        cdef int64_t taken
        cdef int error = -ECHILD if getpid() != self.ring._process else self.c_begin()
        if error:
            return error
        pagecore_ring_enter(ring)
        taken = pagecore_ring_reap_locked(ring)
        if taken < 0:
            error = <int>taken
        elif entry.wrong:
            error = -EBADMSG
        else:
            # S2: the rings are reset, so from here on these pages may be seen.
            newly = pagecore_drain_owned(entry.pending, words, self.size)
        pagecore_ring_leave(ring)
        self.c_end()
        return error if error else <int>min(newly, <size_t>INT_MAX)
