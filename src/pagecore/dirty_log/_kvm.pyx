"""KvmDirtyLog: KVM's dirty bitmap of one memory slot, in its oldest form.

Facts that the code rests on:

- KVM_GET_DIRTY_LOG hands over the bitmap and re-arms what it handed over, in one step: whatever a vCPU
  writes after that is in the next one (S2). With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 it would not
  re-arm; a VM whose owner switched that on needs another log.
- It **overwrites** the buffer that it is given (S11): hence a buffer of our own, from which bits are OR-ed.
- It knows what vCPUs wrote. Writes of the VMM, of vhost or of a device do not pass through the guest's page
  tables: nobody sees them here, which `misses` declares (S12).
- Setting KVM_MEM_LOG_DIRTY_PAGES on a slot write-protects it before the ioctl is back; a vCPU that runs
  meanwhile is logged from then on. What it wrote before is not in the log: all pages are owed
  when logging begins.
"""

cimport cython
from libc.errno cimport EBADF, EBUSY, ENOENT, errno
from libc.limits cimport INT_MAX
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from operator import index

from pagecore._atomic cimport pagecore_exchange, pagecore_fetch_or, pagecore_store_release
from pagecore.dirty_log._protocol cimport DirtyLog

from pagecore.errors import BusyError, ClosedError, UnsupportedError, raise_for_errno


cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **memory, size_t alignment, size_t size)

cdef extern from "<fcntl.h>" nogil:
    enum: F_DUPFD_CLOEXEC
    int fcntl(int fd, int command, ...)

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<linux/kvm.h>" nogil:
    unsigned long KVM_GET_DIRTY_LOG
    unsigned long KVM_SET_USER_MEMORY_REGION
    enum: KVM_MEM_LOG_DIRTY_PAGES
    struct kvm_dirty_log:
        uint32_t slot
        void *dirty_bitmap
    struct kvm_userspace_memory_region:
        uint32_t slot
        uint32_t flags
        uint64_t guest_phys_addr
        uint64_t memory_size
        uint64_t userspace_addr

cdef extern from *:
    int __builtin_popcountll(unsigned long long word) nogil


@cython.final
cdef class KvmDirtyLog(DirtyLog):
    """KvmDirtyLog(vm_fd, size, *, host_address, guest_address=0, slot=0)
    --

    The dirty bitmap that KVM keeps of one memory slot (``KVM_GET_DIRTY_LOG``).

    It re-arms at collect and misses what the VMM writes (``misses == {"vmm"}``). Logging is off until
    :meth:`enable`: it costs a write fault for each page and collect.

    Parameters
    ----------
    vm_fd : int
        The descriptor of the VM; it is duplicated.
    size : int
        Pages of 4 KiB in the slot.
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

    def __init__(self, vm_fd, size, *, host_address, guest_address=0, slot=0):
        cdef void *memory = NULL
        cdef size_t length
        if self._fd >= 0:
            raise BusyError("this log is open already")
        super().__init__(size, rearms_at_collect=True, misses=("vmm",))
        if self.size == 0:
            raise ValueError("a slot has at least one page")
        self.slot = index(slot)
        self._host_address = index(host_address)
        self._guest_address = index(guest_address)
        # KVM writes whole longs; a page of our own keeps it from anything else (S11).
        length = ((self.size + 63) // 64 * 8 + 4095) // 4096 * 4096
        if posix_memalign(&memory, 4096, length):
            raise MemoryError()
        memset(memory, 0, length)
        self._fetched = <uint64_t *>memory
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

    cdef int _set_logging(self, bint on) except -1:
        cdef kvm_userspace_memory_region region
        cdef int error
        # acquire: pairs with the release below; the loser must not see a half-changed slot
        if pagecore_exchange(&self._busy, 1):
            raise BusyError("a collect of this dirty log is under way")
        memset(&region, 0, sizeof(region))
        region.slot = self.slot
        region.flags = KVM_MEM_LOG_DIRTY_PAGES if on else 0
        region.guest_phys_addr = self._guest_address
        region.memory_size = self.size * 4096
        region.userspace_addr = self._host_address
        with nogil:
            error = errno if ioctl(self._fd, KVM_SET_USER_MEMORY_REGION, &region) else 0
        pagecore_store_release(&self._busy, 0)
        if error:
            raise_for_errno(error, "KVM_SET_USER_MEMORY_REGION", self._host_address, region.memory_size)
        self.enabled = on
        return 0

    def enable(self):
        """enable()
        --

        Switch logging on. What the guest wrote before is not logged: every page is owed from here.

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
        KVM_MEM_LOG_DIRTY_PAGES, any KVM.
        """
        if self._fd < 0:
            raise ClosedError("this dirty log is closed")
        if not self.enabled:
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
        if self._fd < 0:
            raise ClosedError("this dirty log is closed")
        if self.enabled:
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
        c_close(self._fd)
        self._fd = -1

    def collect_into(self, bitmap):
        """collect_into(bitmap)
        --

        OR the pages that vCPUs wrote since the last collect into `bitmap`, and re-arm them.

        Parameters
        ----------
        bitmap : Bitmap
            As many pages as the slot, private to the caller.

        Returns
        -------
        int
            Pages newly set in `bitmap`.

        Raises
        ------
        ClosedError
        UnsupportedError
            If logging is off: call :meth:`enable`.
        BusyError
            If another collect is under way.
        ValueError
            If the sizes differ.
        UffdError
            If KVM refused.

        Notes
        -----
        Releases the GIL.
        Thread-safe with vCPUs that run; not with another collect.
        KVM_GET_DIRTY_LOG, any KVM.
        """
        if self._fd < 0:
            raise ClosedError("this dirty log is closed")
        if not self.enabled:
            raise UnsupportedError("the dirty log of a slot without KVM_MEM_LOG_DIRTY_PAGES", "call enable()")
        try:
            return DirtyLog.collect_into(self, bitmap)
        except OSError as error:
            if error.errno == EBUSY:
                raise BusyError("another collect of this dirty log is under way") from error
            raise

    cdef int c_collect_into(self, uint64_t *words) noexcept nogil:
        cdef kvm_dirty_log request
        cdef size_t at, count = (self.size + 63) // 64, newly = 0
        cdef uint64_t word, tail
        cdef int error
        if pagecore_exchange(&self._busy, 1):
            return -EBUSY if self._fd >= 0 else -EBADF
        if not self.enabled:
            pagecore_store_release(&self._busy, 0)
            return -ENOENT
        memset(&request, 0, sizeof(request))
        request.slot = self.slot
        request.dirty_bitmap = self._fetched
        if ioctl(self._fd, KVM_GET_DIRTY_LOG, &request):
            error = errno
            pagecore_store_release(&self._busy, 0)
            return -error
        tail = (<uint64_t>1 << (self.size & 63)) - 1 if self.size & 63 else <uint64_t>-1
        for at in range(count):
            word = self._fetched[at]
            if at == count - 1:
                word &= tail            # a foreign word: bits past the size stay zero here
            if word:
                # acq_rel: the page is read after the bit was published, the bit published after KVM re-armed
                newly += __builtin_popcountll(word & ~pagecore_fetch_or(&words[at], word))
        # release: pairs with the exchange of the next collect, which overwrites the buffer
        pagecore_store_release(&self._busy, 0)
        return <int>newly if newly < <size_t>INT_MAX else INT_MAX

    cdef int c_rearm(self, size_t first, size_t count) noexcept nogil:
        return 0                        # the collect did
