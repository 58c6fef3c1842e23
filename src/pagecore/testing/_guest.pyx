"""Machine: a test guest that runs: its vCPUs, the hints they leave, and what holds and stops them."""

cimport cython
from libc.stdint cimport uint32_t, uint64_t

from pagecore.testing._machine cimport *
from pagecore.testing._machine_state cimport MachineState

import numpy

from pagecore.errors import PagecoreError


cdef object _runs(object pairs):
    """(first, count) pairs as the int64 array of shape (n, 2) that all of pagecore passes around."""
    return numpy.array(pairs, dtype=numpy.int64).reshape(-1, 2)


cdef uint64_t _nanoseconds(double seconds) noexcept:
    return 0 if seconds <= 0 else <uint64_t>(min(seconds, 1e9) * 1e9)


@cython.final
cdef class Machine(MachineState):
    """Machine(memory, *, vcpus=1, dirty=None, pages_per_second=0.0, kvm_device=None, slots=1, ring_size=0)
    --

    One test guest: its memory, its vCPUs, and the locks around them. It starts held.

    Parameters
    ----------
    memory : buffer
        Writable and page-aligned; a multiple of 2 MiB. It is held until :meth:`close`.
    vcpus : int
        1 to ``MAX_VCPUS``. Each needs a thread that calls :meth:`run_vcpu` until that returns False.
    dirty : Bitmap, optional
        A process guest sets the bit of each page here after it wrote the page.
    pages_per_second : float
        Pages that one vCPU writes a second; 0 for as fast as it can.
    kvm_device : str, optional
        The path of ``/dev/kvm``. By default the guest is a thread of this process.
    slots : int
        Memory slots of the VM, 1 to ``MAX_SLOTS``: about equal parts, none of them a multiple of 64 pages.
    ring_size : int
        Bytes of the dirty ring that each vCPU gets; by default none, and KVM keeps bitmaps. See :meth:`use_ring`.

    Raises
    ------
    KvmRefusedError
        If a step of building the VM failed.
    ValueError
        If the memory is not aligned, or the size or the number of vCPUs is out of bounds.

    Notes
    -----
    Each method releases the GIL where it waits or touches guest memory; building a VM does too.
    Thread-safe where a method does not say otherwise; one :meth:`run_vcpu` for each vCPU.
    KVM needs Linux 4.13 (immediate exit); the rest no kernel interface.
    """

    @property
    def bad_hints(self):
        """int: hints of the guest that named pages outside its memory, and were dropped."""
        cdef pagecore_machine *machine = self._open()
        return sum(machine.vcpu[number].bad_hints for number in range(machine.vcpus))

    def run_vcpu(self, number):
        """run_vcpu(number)
        --

        Run one vCPU until there is something for Python: hints to take, a write of the machine, or the end.

        Parameters
        ----------
        number : int

        Returns
        -------
        bool
            False once :meth:`quit` was called.

        Raises
        ------
        PagecoreError
            If the vCPU cannot go on; the message says why.

        Notes
        -----
        Releases the GIL.
        One thread for each vCPU.
        KVM_RUN with Linux 4.13.
        """
        cdef pagecore_vcpu *vcpu = self._vcpu(number)
        cdef int why
        self._enter()
        with nogil:
            why = self.c_run(vcpu)
            self._leave()
        if why == PAGECORE_RUN_FAILED:
            raise PagecoreError(f"vCPU {number}: {(<bytes>vcpu.error_text).decode()}")
        return why != PAGECORE_RUN_QUIT

    def take_hints(self, number):
        """take_hints(number)
        --

        What the last :meth:`run_vcpu` of this vCPU took from its ring. Call it on that vCPU's thread.

        Parameters
        ----------
        number : int

        Returns
        -------
        hints : list of (int, ndarray)
            For each epoch met, in order: the epoch and its runs, int64 of shape (n, 2).
        ended : list of int
            Epochs whose report of free pages is complete.
        written : ndarray or None
            The page that the machine wrote, as one run (rule S12).

        Notes
        -----
        Holds the GIL; touches no guest memory.
        Not thread-safe with :meth:`run_vcpu` of the same vCPU.
        Needs no kernel interface.
        """
        cdef pagecore_vcpu *vcpu = self._vcpu(number)
        cdef list hints = [], ended = [], pairs = []
        cdef uint32_t at
        cdef object epoch = None
        for at in range(vcpu.hint_count):
            if epoch is not None and epoch != vcpu.hints[at].epoch and pairs:
                hints.append((epoch, _runs(pairs)))
                pairs = []
            epoch = vcpu.hints[at].epoch
            if vcpu.hints[at].count == PAGECORE_HINT_END:
                ended.append(epoch)
            else:
                pairs.append((vcpu.hints[at].first, vcpu.hints[at].count))
        if pairs:
            hints.append((epoch, _runs(pairs)))
        written = self.control_page(number) if vcpu.wrote else None
        return hints, ended, written

    def control_page(self, number):
        """control_page(number)
        --

        The control page of a vCPU as one run: int64 of shape (1, 2).
        """
        return _runs([(self._vcpu(number).control_offset // PAGECORE_GUEST_PAGE_SIZE, 1)])

    def pause(self, double timeout):
        """pause(timeout)
        --

        Park every vCPU at the end of its batch.

        Parameters
        ----------
        timeout : float
            Seconds.

        Returns
        -------
        float
            CLOCK_MONOTONIC of the last guest instruction, seconds; 0.0 if the guest never ran.

        Raises
        ------
        TimeoutError
            If a vCPU did not leave the guest in time (it may sleep in a page fault). It stays asked to.
        """
        cdef uint64_t limit = _nanoseconds(timeout), at = 0
        cdef int error
        self._open()
        self._enter()
        with nogil:
            error = self.c_pause(limit, &at)
            self._leave()
        if error:
            raise TimeoutError(f"a vCPU did not leave the guest within {timeout} s: it may wait for a page")
        return at / 1e9

    def resume(self, double timeout):
        """resume(timeout)
        --

        Let every vCPU run.

        Parameters
        ----------
        timeout : float
            Seconds.

        Returns
        -------
        float
            CLOCK_MONOTONIC of the first guest instruction, seconds.

        Raises
        ------
        TimeoutError
            If a vCPU was not entered in time: its thread is busy, or there is none.
        """
        cdef uint64_t limit = _nanoseconds(timeout), at = 0
        cdef int error
        self._open()
        self._enter()
        with nogil:
            error = self.c_resume(limit, &at)
            self._leave()
        if error:
            raise TimeoutError(f"a vCPU was not entered within {timeout} s")
        return at / 1e9

    def wait_stopped(self, double timeout):
        """wait_stopped(timeout)
        --

        Wait until every vCPU has stopped itself, or failed.

        Parameters
        ----------
        timeout : float
            Seconds.

        Returns
        -------
        bool
            False if the time ran out.
        """
        cdef uint64_t limit = _nanoseconds(timeout)
        cdef bint stopped
        self._open()
        self._enter()
        with nogil:
            stopped = self.c_wait_stopped(limit)
            self._leave()
        return stopped

    def quit(self):
        """quit()
        --

        Make every :meth:`run_vcpu` return False as soon as its vCPU leaves the guest.
        """
        self._open()
        self._enter()
        with nogil:
            self.c_quit()
            self._leave()

    def throttle(self, share):
        """throttle(share)
        --

        Have every vCPU rest for this share of its time, from its next batch on.

        Parameters
        ----------
        share : float
            In [0, 0.99].
        """
        cdef double part = share
        self._open()
        if not 0 <= part <= 0.99:
            raise ValueError(f"share {share} is outside [0, 0.99]")
        self.c_throttle(part)

    def announce(self, command, epoch):
        """announce(command, epoch)
        --

        Write a hint command into every control page. The caller reports the write (rule S12).

        Parameters
        ----------
        command : int
            1 START, 2 STOP, 3 DONE.
        epoch : int

        Returns
        -------
        ndarray
            The pages written, int64 of shape (n, 2).

        Notes
        -----
        Releases the GIL: at the destination the page may be missing.
        Thread-safe with everything.
        Needs no kernel interface.
        """
        cdef pagecore_machine *machine = self._open()
        cdef uint64_t word
        if not 1 <= command <= 3:
            raise ValueError(f"command {command} is outside [1, 3]")
        if not 0 <= epoch < 1 << 62:
            raise ValueError(f"epoch {epoch} is outside [0, 2**62)")
        word = <uint64_t>epoch << 2 | <uint64_t>command
        self._enter()
        with nogil:
            self.c_announce(word)
            self._leave()
        return numpy.concatenate([self.control_page(number) for number in range(machine.vcpus)])

    def stop_after(self, steps):
        """stop_after(steps)
        --

        Ask every vCPU to stop itself after so many more steps.

        Parameters
        ----------
        steps : int
            Steps of each vCPU, counted from where it is now (a running one: from the end of its batch).

        Returns
        -------
        ndarray
            The pages that this call wrote (rule S12), int64 of shape (n, 2); running vCPUs write theirs
            later.
        """
        cdef uint64_t pages[16]
        cdef uint64_t more
        cdef uint32_t count, at
        self._open()
        if not 0 <= steps < 1 << 62:
            raise ValueError(f"{steps} steps are outside [0, 2**62)")
        more = steps
        self._enter()
        with nogil:
            count = self.c_stop_after(more, pages)
            self._leave()
        return _runs([(pages[at], 1) for at in range(count)])

    def counters(self, number):
        """counters(number)
        --

        The counters of one vCPU as they were when it last left the guest. Reads no guest memory.

        Parameters
        ----------
        number : int

        Returns
        -------
        dict of str to int
            ``steps``, ``checks``, ``errors``, ``written``, ``freed``, ``allocated``, ``free_pages``, and
            ``error_page``, ``error_step``, ``error_word``, ``error_found``, ``error_wanted`` of the first
            error.
        """
        cdef pagecore_control control
        cdef uint32_t which
        self._vcpu(number)
        which = number
        self._enter()
        with nogil:
            self.c_seen(which, &control)
            self._leave()
        return {
            "steps": control.steps,
            "checks": control.checks,
            "errors": control.errors,
            "written": control.written,
            "freed": control.freed,
            "allocated": control.allocated,
            "free_pages": control.free_pages,
            "error_page": control.error_page,
            "error_step": control.error_step,
            "error_word": control.error_word,
            "error_found": control.error_found,
            "error_wanted": control.error_wanted,
        }
