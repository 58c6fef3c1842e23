"""KVM's dirty bitmap of one memory slot: KvmDirtyLog re-arms at collect, KvmManualDirtyLog apart.

Facts that the code rests on:

- KVM_GET_DIRTY_LOG hands over the bitmap and re-arms what it handed over, in one step: whatever a vCPU writes after
  that is in the next one (S2). With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 it only copies: a bit stays, and the page's
  further writes log nothing, until KVM_CLEAR_DIRTY_LOG takes the bit away. That holds for the whole VM, and each
  enable() sets it for its own kind. So mixing kinds on one VM loses writes: once another slot's enable() has ended
  manual protection, GET re-arms, and CLEAR under an older sighting takes away a bit that nobody saw. (The other way
  round, a KvmDirtyLog reports the same pages for ever.) No log can detect it: KVM does not say which way it is set.
  Whoever makes the logs of a VM makes all that are enabled at one time of one kind.
- It **overwrites** the buffer that it is given (S11): hence a buffer of our own, from which bits are OR-ed.
- KVM_CLEAR_DIRTY_LOG wants a first page that is a multiple of 64, and so many pages or all up to the slot's end. Bits of
  other pages in there are masked. A bit that is cleared without having been seen, or a second time for one sighting, is
  a write lost (S11): the log remembers what it handed over, and uses each sighting up.
- With KVM_DIRTY_LOG_INITIALLY_SET all bits are 1 when logging begins, and nothing is write-protected before its bit is
  cleared: beginning costs nothing, and the first collect reports every page.
- It knows what vCPUs wrote. Writes of the VMM, of vhost or of a device do not pass through the guest's page
  tables: nobody sees them here, which `misses` declares (S12).
- Setting KVM_MEM_LOG_DIRTY_PAGES on a slot write-protects it before the ioctl is back; a vCPU that runs
  meanwhile is logged from then on. What it wrote before is not in the log: all pages are owed
  when logging begins.
- KVM has no such bitmap in a VM with dirty rings (ENXIO): _kvm_ring.pyx.
"""

cimport cython
from libc.errno cimport EBADF, EBADMSG, EBUSY, ECHILD, ENOENT, ENXIO, errno
from libc.limits cimport INT_MAX
from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memset

from operator import index

from pagecore._atomic cimport pagecore_exchange, pagecore_store_release
from pagecore._bitscan cimport PAGECORE_OR, pagecore_combine
from pagecore.dirty_log._protocol cimport DirtyLog

from pagecore.errors import BusyError, ClosedError, ProtocolError, UnsupportedError, raise_for_errno


cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **memory, size_t alignment, size_t size)

cdef extern from "<fcntl.h>" nogil:
    enum: F_DUPFD_CLOEXEC
    int fcntl(int fd, int command, ...)

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "dirty_log/_kvm_abi.h" nogil:
    unsigned long KVM_CHECK_EXTENSION
    unsigned long KVM_ENABLE_CAP
    unsigned long KVM_GET_DIRTY_LOG
    unsigned long KVM_SET_USER_MEMORY_REGION
    unsigned long PAGECORE_KVM_CLEAR_DIRTY_LOG
    enum: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
    enum: KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
    enum: KVM_DIRTY_LOG_INITIALLY_SET
    enum: KVM_MEM_LOG_DIRTY_PAGES
    struct kvm_dirty_log:
        uint32_t slot
        void *dirty_bitmap
    struct kvm_enable_cap:
        uint32_t cap
        uint64_t *args
    struct kvm_userspace_memory_region:
        uint32_t slot
        uint32_t flags
        uint64_t guest_phys_addr
        uint64_t memory_size
        uint64_t userspace_addr
    struct pagecore_kvm_clear:
        uint32_t slot
        uint32_t num_pages
        uint64_t first_page
        uint64_t dirty_bitmap

cdef enum:
    # Words of one KVM_CLEAR_DIRTY_LOG: 1 GiB, as QEMU has it. KVM holds its MMU lock for all of a call, and every vCPU
    # that faults meanwhile waits for it.
    PIECE = 1 << 12


cdef uint64_t *new_words(size_t size) except NULL:
    """Zeroed words for `size` pages. KVM writes whole longs: pages of our own keep it from anything else (S11).

    That is enough for a slot of `size` pages. KVM writes as many as its slot has now, and is not told how many we have:
    the slot must not be recreated with another size while its log is open, or KVM writes past the end of these.
    """
    cdef void *memory = NULL
    cdef size_t length = ((size + 63) // 64 * 8 + 4095) // 4096 * 4096
    if posix_memalign(&memory, 4096, length):
        raise MemoryError()
    memset(memory, 0, length)
    return <uint64_t *>memory


cdef int set_manual_protect(int fd, uint64_t how) noexcept nogil:
    cdef kvm_enable_cap request
    memset(&request, 0, sizeof(request))
    request.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
    request.args[0] = how
    return errno if ioctl(fd, KVM_ENABLE_CAP, &request) else 0


cdef class KvmSlotLog(DirtyLog):
    """KvmSlotLog(vm_fd, size, *, host_address, guest_address=0, slot=0, rearms_at_collect=True)
    --

    What KVM's logs of one memory slot have in common: the VM's descriptor, and logging on and off.

    Each misses what the VMM writes (``misses == {"vmm"}``). Logging is off until :meth:`enable`: it costs a write fault
    for each page and collect.

    All logs of a VM that are enabled must be of one kind: :meth:`enable` sets how the whole VM logs. Mixing kinds
    loses writes (of a `KvmManualDirtyLog` that was enabled before), and no log can detect it. Nor may the slot be
    recreated with another size while its log is open: KVM would write its bitmap past the end of the log's memory.

    Parameters
    ----------
    vm_fd : int
        The descriptor of the VM; it is duplicated.
    size : int
        Pages of 4 KiB in the slot: all of it.
    host_address : int
        Where the slot's memory is in this process.
    guest_address : int
        Where it is in the guest.
    slot : int
        The slot's number.

    Attributes
    ----------
    slot : int
    enabled : bool
        Whether this log has switched logging on.

    Raises
    ------
    ValueError
        If `size` is not above 0.
    UffdError
        If the descriptor cannot be duplicated.
    """

    def __cinit__(self, *args, **kwargs):
        self._fd = -1

    def __init__(self, vm_fd, size, *, host_address, guest_address=0, slot=0, rearms_at_collect=True):
        if self._fetched != NULL:
            raise BusyError("this log is open already")
        super().__init__(size, rearms_at_collect=rearms_at_collect, misses=("vmm",))
        if self.size == 0:
            raise ValueError("a slot has at least one page")
        self.slot = index(slot)
        self._host_address = index(host_address)
        self._guest_address = index(guest_address)
        self._fetched = new_words(self.size)
        self._fd = fcntl(index(vm_fd), F_DUPFD_CLOEXEC, 0)
        if self._fd < 0:
            raise_for_errno(errno, "F_DUPFD_CLOEXEC of a VM")

    def __dealloc__(self):
        if self._fd >= 0:
            c_close(self._fd)
        free(self._fetched)

    @property
    def closed(self):
        """bool: whether :meth:`close` was called."""
        return self._fd < 0

    cdef int _check(self) except -1:
        if self._fd < 0:
            raise ClosedError("this dirty log is closed")
        if not self.enabled:
            raise UnsupportedError("the dirty log of a slot without KVM_MEM_LOG_DIRTY_PAGES", "call enable()")
        return 0

    cdef int _fail(self, int number, str method) except -1:
        if number == EBUSY:
            raise BusyError("another collect or re-arm of this dirty log is under way")
        if number == EBADF:
            raise ClosedError("this dirty log, or the ring that it is of, is closed")
        if number == EBADMSG:
            raise ProtocolError(
                "dirty ring entry",
                "a page outside its slot, or a reset cut short: disable(), enable(), and owe every page of the slot",
            )
        if number == ECHILD:
            raise UnsupportedError("the dirty ring of a VM in a child of its process", "only that process may reap it")
        if number == ENXIO:
            raise UnsupportedError(
                "KVM's dirty bitmap", "this VM has dirty rings: take KvmRingDirtyLog, or a VM without them"
            )
        return DirtyLog._fail(self, number, method)

    cdef int _before_logging(self) except -1:
        return 0

    cdef int _after_logging(self) except -1:
        return 0

    cdef int _before_close(self) except -1:
        return 0

    cdef int _end_manual_protect(self) except -1:
        """Under manual protection a collect would re-arm nothing, and a ring would never hear of a page."""
        cdef int error = 0
        with nogil:
            if ioctl(self._fd, KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) > 0:
                error = set_manual_protect(self._fd, 0)
        if error:
            raise_for_errno(error, "KVM_ENABLE_CAP of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
        return 0

    cdef int _set_logging(self, bint on) except -1:
        cdef kvm_userspace_memory_region region
        cdef int error
        if self._fd < 0:
            raise ClosedError("this dirty log is closed")
        # acquire: pairs with the release below; the loser must not see a half-changed slot
        if pagecore_exchange(&self._busy, 1):
            raise BusyError("a collect of this dirty log is under way")
        try:
            if self.enabled == on:
                return 0
            if on:
                self._before_logging()
            memset(&region, 0, sizeof(region))
            region.slot = self.slot
            region.flags = KVM_MEM_LOG_DIRTY_PAGES if on else 0
            region.guest_phys_addr = self._guest_address
            region.memory_size = self.size * 4096
            region.userspace_addr = self._host_address
            with nogil:
                error = errno if ioctl(self._fd, KVM_SET_USER_MEMORY_REGION, &region) else 0
            if error:
                if on:
                    self._after_logging()
                raise_for_errno(error, "KVM_SET_USER_MEMORY_REGION", self._host_address, region.memory_size)
            self.enabled = on
            if not on:
                self._after_logging()
        finally:
            pagecore_store_release(&self._busy, 0)
        return 0

    def enable(self):
        """enable()
        --

        Switch logging on, for the whole slot. What the guest wrote before is not logged: every page is owed from here.
        It sets the kind of log for the whole VM: see the class for what that does to logs of another kind.

        Raises
        ------
        ClosedError
        BusyError
            If a collect is under way.
        UnsupportedError
            If this KVM does not have this kind of log.
        UffdError
            If KVM refused; EINVAL where size or addresses are not those of the slot.

        Notes
        -----
        Releases the GIL.
        Thread-safe with vCPUs that run; not with a collect.
        KVM_MEM_LOG_DIRTY_PAGES, any KVM; and what the kind of log needs.
        """
        self._set_logging(True)

    def disable(self):
        """disable()
        --

        Switch logging off, and drop what was logged.

        Raises
        ------
        ClosedError
        BusyError
            If a collect is under way.
        UffdError
            If KVM refused.

        Notes
        -----
        Releases the GIL.
        Thread-safe with vCPUs that run; not with a collect.
        Any KVM.
        """
        self._set_logging(False)

    def close(self):
        """close()
        --

        Let go of the VM; logging stays as it is. Idempotent.

        Raises
        ------
        BusyError
            If a collect is under way.

        Notes
        -----
        Releases no GIL: it is one close.
        Not thread-safe with a collect.
        Needs no kernel interface.
        """
        if self._fd < 0:
            return
        # Never given back: a later collect finds the log busy, not a descriptor that is somebody else's.
        if pagecore_exchange(&self._busy, 1):
            raise BusyError("a collect of this dirty log is under way")
        self._before_close()
        c_close(self._fd)
        self._fd = -1

    cdef int c_begin(self) noexcept nogil:
        # acquire: pairs with the release of whoever had the buffers before
        if pagecore_exchange(&self._busy, 1):
            return -EBUSY if self._fd >= 0 else -EBADF
        if not self.enabled:
            self.c_end()
            return -ENOENT
        return 0

    cdef void c_end(self) noexcept nogil:
        # release: pairs with the exchange of the next one, which overwrites the buffers
        pagecore_store_release(&self._busy, 0)

    cdef int c_get(self) noexcept nogil:
        cdef kvm_dirty_log request
        memset(&request, 0, sizeof(request))
        request.slot = self.slot
        request.dirty_bitmap = self._fetched
        return -errno if ioctl(self._fd, KVM_GET_DIRTY_LOG, &request) else 0


@cython.final
cdef class KvmDirtyLog(KvmSlotLog):
    """KvmDirtyLog(vm_fd, size, *, host_address, guest_address=0, slot=0)
    --

    The dirty bitmap that KVM keeps of one memory slot (``KVM_GET_DIRTY_LOG``).

    It re-arms at collect and misses what the VMM writes (``misses == {"vmm"}``). Logging is off until
    :meth:`enable`: it costs a write fault for each page and collect. enable() also switches manual protection
    (`KvmManualDirtyLog`) of the whole VM off, under which a collect would re-arm nothing. Do not mix: a
    `KvmManualDirtyLog` that is enabled on another slot of this VM loses writes from then on, and cannot detect it.

    Parameters, attributes and errors: as `KvmSlotLog` has them.
    """

    cdef int _before_logging(self) except -1:
        return self._end_manual_protect()

    cdef int c_collect_into(self, uint64_t *words) noexcept nogil:
        cdef size_t newly = 0
        cdef int error = self.c_begin()
        if error:
            return error
        error = self.c_get()
        if not error:
            # Both are ours alone: no locks. Bits past the size, which are KVM's, go nowhere.
            newly = pagecore_combine(words, self._fetched, words, self.size, PAGECORE_OR)
        self.c_end()
        return error if error else <int>min(newly, <size_t>INT_MAX)


@cython.final
cdef class KvmManualDirtyLog(KvmSlotLog):
    """KvmManualDirtyLog(vm_fd, size, *, host_address, guest_address=0, slot=0)
    --

    The dirty bitmap that KVM keeps of one memory slot, re-armed apart (``KVM_CLEAR_DIRTY_LOG``, manual protection).

    A collect only copies; a page is reported by every collect until :meth:`rearm` or :meth:`rearm_seen`, and its writes
    meanwhile cost nothing. So a tracker with ``rearm="lazy"`` re-arms a piece of memory right before it sends it, and
    the guest takes its write faults little by little; with ``rearm="sync"`` hints may promise ``armed``. It misses what
    the VMM writes (``misses == {"vmm"}``). Logging is off until :meth:`enable`, which switches manual protection on for
    the whole VM. Do not mix: once a `KvmDirtyLog` is enabled on another slot of this VM, this log loses writes, and
    cannot detect it; in the other order that one re-arms nothing any more, and reports the same pages for ever.

    Where KVM can, all pages are reported at first, and none is write-protected before it is re-armed: call ``sync()``
    before the first page is sent, or the next one finds all of them owed again.

    Parameters, attributes and errors: as `KvmSlotLog` has them; and

    Attributes
    ----------
    initially_set : bool
        Whether the first collect reports every page; known once logging is on.
    """

    def __init__(self, vm_fd, size, *, host_address, guest_address=0, slot=0):
        KvmSlotLog.__init__(
            self,
            vm_fd,
            size,
            host_address=host_address,
            guest_address=guest_address,
            slot=slot,
            rearms_at_collect=False,
        )
        self._seen = new_words(self.size)

    def __dealloc__(self):
        free(self._seen)

    cdef int _before_logging(self) except -1:
        cdef int able, error = 0
        with nogil:
            able = ioctl(self._fd, KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
            if able < 0:
                error = errno
        if error:
            raise_for_errno(error, "KVM_CHECK_EXTENSION")
        able &= KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET
        if not able & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE:
            raise UnsupportedError("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", "Linux 5.2 or newer; KvmDirtyLog does without")
        with nogil:
            error = set_manual_protect(self._fd, able)
            # Of a bitmap that is gone with the last disable(): these would clear bits of the new one unseen.
            memset(self._seen, 0, (self.size + 63) // 64 * sizeof(uint64_t))
        if error:
            raise_for_errno(error, "KVM_ENABLE_CAP of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
        self.initially_set = bool(able & KVM_DIRTY_LOG_INITIALLY_SET)
        return 0

    cdef int c_collect_into(self, uint64_t *words) noexcept nogil:
        cdef size_t newly = 0
        cdef int error = self.c_begin()
        if error:
            return error
        error = self.c_get()
        if not error:
            pagecore_combine(self._seen, self._fetched, self._seen, self.size, PAGECORE_OR)
            newly = pagecore_combine(words, self._fetched, words, self.size, PAGECORE_OR)
        self.c_end()
        return error if error else <int>min(newly, <size_t>INT_MAX)

    cdef int c_rearm(self, size_t first, size_t count) noexcept nogil:
        cdef int error = self.c_begin()
        if error:
            return error
        error = self.c_clear(first, count, NULL)
        self.c_end()
        return error

    cdef int c_rearm_seen(self, size_t first, size_t count, const uint64_t *words) noexcept nogil:
        cdef int error = self.c_begin()
        if error:
            return error
        error = self.c_clear(first, count, words)
        self.c_end()
        return error

    cdef int c_clear(self, size_t first, size_t count, const uint64_t *words) noexcept nogil:
        """Clears what was seen of pages [first, first + count), and of that what is 1 in `words`, if given. A piece that
        was cleared before another one fails is used up: whoever tries again cannot clear its bits a second time."""
        cdef pagecore_kvm_clear request
        cdef size_t end = first + count, begin = first >> 6, stop = (end + 63) >> 6, at, low, high, until
        cdef uint64_t bits
        cdef uint64_t *wanted = self._fetched      # KVM has no other use for it now
        memset(&request, 0, sizeof(request))
        request.slot = self.slot
        at = begin
        while at < stop:
            until = min(at + PIECE, stop)
            low = high = until
            while at < until:
                bits = self._seen[at]
                if words != NULL:
                    bits &= words[at - begin]
                if at == begin:
                    bits &= <uint64_t>-1 << (first & 63)
                if at == end >> 6:
                    bits &= (<uint64_t>1 << (end & 63)) - 1
                wanted[at] = bits
                if bits:
                    low = min(low, at)
                    high = at + 1
                at += 1
            if low == until:
                continue
            request.first_page = low << 6
            request.num_pages = <uint32_t>(min(high << 6, self.size) - (low << 6))
            request.dirty_bitmap = <uintptr_t>&wanted[low]
            if ioctl(self._fd, PAGECORE_KVM_CLEAR_DIRTY_LOG, &request):
                return -errno
            while low < high:
                self._seen[low] &= ~wanted[low]
                low += 1
        return 0
