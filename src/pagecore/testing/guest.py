"""Guest: the guests that ``make run`` and the tests move, under KVM or in this process."""

from __future__ import annotations

import dataclasses
import logging
import mmap
import signal
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from typing import Any, Literal

from pagecore.dirty_log import DirtyLog, KvmDirtyRing, MemoryDirtyLog, PagemapDirtyLog
from pagecore.dirty_log._kvm import KvmSlotLog
from pagecore.errors import BusyError, ClosedError, PagecoreError, ProtocolError
from pagecore.testing import _guest
from pagecore.testing.config import GuestConfig
from pagecore.testing.logs import LOGS, RING_SIZE, open_kvm_logs, open_pagemap_logs

__all__ = ["Guest", "GuestStats"]

logger = logging.getLogger("pagecore.testing")

KVM_DEVICE = "/dev/kvm"
COMMANDS = {"START": 1, "STOP": 2, "DONE": 3}
KINDS = {"process": 1, "kvm": 2}
# magic, version, kind, vCPUs, size, seed, free share of 2**32, length of the registers, crc32 of all else
STATE = struct.Struct("<4sHBBQQQII")
STATE_MAGIC = b"PGGS"
STATE_VERSION = 1
JOIN_SECONDS = 5.0
# A page fault that nobody serves is the only thing that keeps a vCPU inside for longer than a batch.
PAUSE_SECONDS = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class GuestStats:
    """Counters of all vCPUs together, as of the last time that each left the guest.

    Attributes
    ----------
    steps, self_checks, self_check_errors : int
        Steps taken; pages whose whole content the guest compared; how many of those were not what they must
        be.
    pages_written, pages_freed, pages_allocated : int
        `pages_written` includes the first write of each allocated page.
    free_pages : int
        Data pages that are free now.
    bad_hints : int
        Hints that named pages outside the memory.
    first_error : str
        What the guest found wrong first; empty where nothing was.
    """

    steps: int
    self_checks: int
    self_check_errors: int
    pages_written: int
    pages_freed: int
    pages_allocated: int
    free_pages: int
    bad_hints: int
    first_error: str


class Guest:
    """A test guest: memory that changes all the time, hints what it frees, and checks itself. See
    `open_guest`.

    Attributes
    ----------
    kind : str
        ``"kvm"`` or ``"process"``.
    reason : str
        Why it is this kind.
    config : GuestConfig
    role : str
        ``"source"`` or ``"destination"``.
    memory : mmap.mmap
        Anonymous, private, page-aligned. Reading it from Python holds the GIL: never while it is registered
        with a userfaultfd (:meth:`read` does not).
    npages : int
        Pages of 4 KiB.
    log_kind : str
        Which log it keeps, as `open_guest` names them.
    slots : tuple of (int, int)
        First page and page count of what each log of `dirty_logs` is about.
    on_hints : callable or None
        ``f(epoch, runs)`` with runs int64 of shape (n, 2), called on a vCPU's thread as hints arrive.
    on_vmm_write : callable or None
        ``f(runs)``, called after each write of the machine into guest memory, which KVM's log misses (rule
        S12).
    error : Exception or None
        The first failure of a vCPU or of a callback; `pause` and the waits raise it.
    """

    def __init__(
        self,
        config: GuestConfig,
        *,
        kind: Literal["kvm", "process"],
        role: Literal["source", "destination"],
        reason: str,
        device: str = KVM_DEVICE,
        dirty_log: str = "auto",
        slots: int = 1,
        ring_size: int = RING_SIZE,
    ) -> None:
        self.kind = kind
        self.log_kind = LOGS[kind][0] if dirty_log == "auto" else dirty_log
        self.role = role
        self.reason = reason
        self.config = config
        self.npages = config.npages
        self.on_hints: Callable[[int, Any], object] | None = None
        self.on_vmm_write: Callable[[Any], object] | None = None
        self.error: Exception | None = None
        self._changed = threading.Condition()
        self._reported = [0] * config.vcpus
        self._threads: list[threading.Thread] = []
        self._marks: MemoryDirtyLog | None = None
        self._logs: tuple[KvmSlotLog, ...] | tuple[PagemapDirtyLog, ...] = ()  # switched on, and closed with the guest
        self._stats: GuestStats | None = None
        try:
            self.memory = mmap.mmap(-1, config.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise OSError(error.errno, f"{config.size >> 20} MiB of memory for a guest: {error.strerror}") from None
        dirty = None
        if self.log_kind == "marks" and role == "source":
            # From the first step on: a batch that began without a log would be missed.
            self._marks = MemoryDirtyLog(self.npages)
            dirty = self._marks.bitmap
        self._machine = _guest.Machine(
            self.memory,
            vcpus=config.vcpus,
            dirty=dirty,
            pages_per_second=config.pages_per_second,
            kvm_device=device if kind == "kvm" else None,
            slots=slots,
            ring_size=ring_size if self.log_kind == "ring" else 0,
        )
        self.slots = self._machine.slots
        self._ring: KvmDirtyRing | None = None
        if self.log_kind == "ring":
            self._ring = KvmDirtyRing(self._machine.vm_fd, self._machine.vcpu_fds, ring_size)
            self._machine.use_ring(self._ring)
        self._closed = False

    def __repr__(self) -> str:
        size = self.config.size >> 20
        config = self.config
        return f"<Guest {self.kind} {self.role} of {size} MiB, {config.vcpus} vCPUs, seed {config.seed}>"

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)

    @property
    def dirty_log(self) -> DirtyLog:
        """The log of the guest's writes, ready to be collected. One of the kernel's is switched on at the first access;
        until then nothing is logged, and every page is owed anyway.

        Raises
        ------
        PagecoreError
            For a process guest that is a destination: it keeps no log. Or if there are several: see `dirty_logs`.
        """
        logs = self.dirty_logs
        if len(logs) > 1:
            raise PagecoreError(f"this guest has {len(logs)} memory slots: there is a log of each in dirty_logs")
        return logs[0]

    @property
    def dirty_logs(self) -> tuple[DirtyLog, ...]:
        """The log of each memory slot, in the order of `slots`; see `dirty_log`."""
        if self._closed:
            raise ClosedError("this guest is closed")
        if self._marks is not None:
            return (self._marks,)
        if self.log_kind == "marks":
            raise PagecoreError("a process guest that is a destination keeps no dirty log")
        if not self._logs and self.log_kind == "pagemap":
            self._logs = open_pagemap_logs(self.memory, self.slots)
        elif not self._logs:
            self._logs = open_kvm_logs(self._machine, self.log_kind, self._ring)
        return self._logs

    def stop_logging(self) -> None:
        """Switch the dirty log off again, after a migration that did not happen. The log of marks is always on.

        Raises
        ------
        BusyError
            If a collect is under way.
        """
        for log in self._logs:
            if not isinstance(log, PagemapDirtyLog):
                log.disable()
            log.close()
        self._logs = ()

    def boot(self) -> None:
        """Fill the memory: every page is written once, then the share of free pages is freed in extents of 16
        to 1024 pages, which keep their content.

        Notes
        -----
        Releases the GIL.
        Not thread-safe with a guest that runs.
        Needs no kernel interface.
        """
        self._machine.boot(self.config.seed, self.config.share, self.config.batch)

    def run(self, timeout: float = PAUSE_SECONDS) -> float:
        """Start the vCPUs.

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
            If a vCPU was not entered in time.
        """
        if self._closed:
            raise ClosedError("this guest is closed")
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._run_vcpu, args=(number,), name=f"vcpu{number}", daemon=True)
                for number in range(self.config.vcpus)
            ]
            for thread in self._threads:
                thread.start()
        return self._machine.resume(timeout)

    def resume(self, timeout: float = PAUSE_SECONDS) -> float:
        """Let a paused guest run on; the same as :meth:`run`.

        Parameters
        ----------
        timeout : float
            Seconds.

        Returns
        -------
        float
            CLOCK_MONOTONIC when the first vCPU was entered, seconds: a fault on its first instruction comes
            after.

        Raises
        ------
        TimeoutError
            If a vCPU was not entered in time.
        """
        return self.run(timeout)

    def pause(self, timeout: float = PAUSE_SECONDS) -> float:
        """Stop the guest at the end of its batch; hints and writes of the machine up to there are handed over
        first.

        Calling it again changes nothing and returns the same.

        Parameters
        ----------
        timeout : float
            Seconds.

        Returns
        -------
        float
            CLOCK_MONOTONIC of the last guest instruction, seconds; 0.0 if it never ran.

        Raises
        ------
        TimeoutError
            If a vCPU sleeps in a page fault that nobody serves. It stays asked to stop.
        RuntimeError
            If a callback of this guest calls it: the vCPU would wait for itself.
        Exception
            What failed in a vCPU or a callback, once the guest stands still.
        """
        if threading.current_thread() in self._threads:
            raise RuntimeError("a callback of the guest cannot pause it: its vCPU would wait for itself")
        last = self._machine.pause(timeout)
        self._raise_error()
        return last

    def throttle(self, share: float) -> None:
        """Slow the guest down: each vCPU rests for this share of its time.

        Parameters
        ----------
        share : float
            In [0, 0.99]; 0 lets it go on as before.

        Notes
        -----
        Holds the GIL for a moment.
        Thread-safe with everything.
        Needs no kernel interface.
        """
        self._machine.throttle(share)

    def stop_after(self, steps: int) -> None:
        """Ask each vCPU to stop itself after so many more steps.

        Parameters
        ----------
        steps : int
            Counted from where a paused vCPU stands, or from the end of a running vCPU's batch.
        """
        self._wrote(self._machine.stop_after(steps))

    def wait_stopped(self, timeout: float) -> bool:
        """Wait until every vCPU has stopped itself.

        Parameters
        ----------
        timeout : float
            Seconds.

        Returns
        -------
        bool
            False if the time ran out.

        Raises
        ------
        Exception
            What failed in a vCPU or a callback.
        """
        stopped = self._machine.wait_stopped(timeout)
        self._raise_error()
        return stopped

    def announce(self, command: object, epoch: int) -> None:
        """Tell the guest that a hint epoch starts, or that hinting stops or is done.

        Parameters
        ----------
        command : hints.Command, str or int
            START (1), STOP (2) or DONE (3), or anything with such a ``name``.
        epoch : int

        Notes
        -----
        Releases the GIL: works on registered memory.
        Thread-safe with everything.
        Needs no kernel interface.
        """
        name = getattr(command, "name", command)
        word = COMMANDS.get(name) if isinstance(name, str) else name
        if not isinstance(word, int) or word not in COMMANDS.values():
            raise ValueError(f"command {command!r} is none of {', '.join(COMMANDS)}")
        self._wrote(self._machine.announce(word, epoch))

    def wait_hints_reported(self, epoch: int, timeout: float) -> bool:
        """Wait until every vCPU has reported its free pages of this epoch, and `on_hints` has had them.

        Parameters
        ----------
        epoch : int
        timeout : float
            Seconds.

        Returns
        -------
        bool
            False if the time ran out.

        Raises
        ------
        Exception
            What failed in a vCPU or a callback.
        """
        with self._changed:
            done = self._changed.wait_for(
                lambda: self.error is not None or all(seen >= epoch for seen in self._reported), timeout
            )
        self._raise_error()
        return done

    def stats(self) -> GuestStats:
        """Counters as of the last time that each vCPU left the guest. Reads no guest memory.

        Returns
        -------
        GuestStats
            Of a closed guest, its last.
        """
        if self._stats is not None:
            return self._stats
        each = [self._machine.counters(number) for number in range(self.config.vcpus)]
        first = next((number for number, counters in enumerate(each) if counters["errors"]), None)
        text = ""
        if first is not None:
            at = each[first]
            text = (
                f"vCPU {first}, step {at['error_step']}: page {at['error_page']} word {at['error_word']} is"
                f" {at['error_found']:#x}, must be {at['error_wanted']:#x}"
            )

        def total(name: str) -> int:
            return sum(counters[name] for counters in each)

        return GuestStats(
            steps=total("steps"),
            self_checks=total("checks"),
            self_check_errors=total("errors"),
            pages_written=total("written"),
            pages_freed=total("freed"),
            pages_allocated=total("allocated"),
            free_pages=total("free_pages"),
            bad_hints=self._machine.bad_hints,
            first_error=text,
        )

    def read(self, offset: int, length: int) -> bytes:
        """Copy bytes out of guest memory without the GIL, so that a missing page may be filled meanwhile.

        Parameters
        ----------
        offset, length : int
            Bytes.

        Returns
        -------
        bytes
        """
        return self._machine.read(offset, length)

    def save_state(self) -> bytes:
        """What a paused guest is beside its memory: the registers of a KVM guest; nothing of a process guest.

        Returns
        -------
        bytes
            With a magic, a version, the kind, the configuration and a checksum.

        Raises
        ------
        Exception
            What failed in a vCPU or a callback.
        TimeoutError
            If the guest could not be paused.
        """
        self.pause()
        registers = self._machine.registers()
        fields = (
            STATE_MAGIC,
            STATE_VERSION,
            KINDS[self.kind],
            self.config.vcpus,
            self.config.size,
            self.config.seed,
            self.config.share,
            len(registers),
        )
        checksum = zlib.crc32(STATE.pack(*fields, 0) + registers)
        return STATE.pack(*fields, checksum) + registers

    def load_state(self, state: bytes) -> None:
        """Become the guest that `save_state` saved; its memory comes another way. Touches no guest memory.

        Parameters
        ----------
        state : bytes

        Raises
        ------
        ProtocolError
            If the state is damaged, or that of a guest of another kind or configuration; the message says
            which. The guest is as it was.
        """
        if len(state) < STATE.size:
            raise ProtocolError("guest state", f"{len(state)} bytes, its head alone has {STATE.size}")
        magic, version, kind, vcpus, size, seed, share, length, checksum = STATE.unpack_from(state)
        if magic != STATE_MAGIC:
            raise ProtocolError("guest state magic", f"{magic!r} is not {STATE_MAGIC!r}")
        if version != STATE_VERSION:
            raise ProtocolError("guest state version", f"{version}, this side knows {STATE_VERSION}")
        if len(state) != STATE.size + length:
            announced = STATE.size + length
            raise ProtocolError("guest state", f"{len(state)} bytes, its head announces {announced}")
        registers = bytes(state[STATE.size :])
        if checksum != zlib.crc32(bytes(state[: STATE.size - 4]) + bytes(4) + registers):
            raise ProtocolError("guest state checksum", "the state was damaged on the way")
        names = {number: name for name, number in KINDS.items()}
        for field, theirs, ours in (
            ("kind", names.get(kind, kind), self.kind),
            ("vcpus", vcpus, self.config.vcpus),
            ("size", size, self.config.size),
            ("seed", seed, self.config.seed),
            ("free share", share, self.config.share),
        ):
            if theirs != ours:
                raise ProtocolError(f"guest state {field}", f"{theirs} does not fit this guest's {ours}")
        try:
            self._machine.set_registers(registers)
        except ValueError as error:
            raise ProtocolError("guest state registers", str(error)) from error

    def close(self) -> None:
        """End the vCPUs and let go of the memory. Idempotent.

        A vCPU, or another call, that sleeps in a page fault which nobody serves cannot be ended: then everything
        stays open, with a ResourceWarning, until the process ends.
        """
        if self._closed:
            return
        self._closed = True
        self._machine.quit()
        deadline = time.monotonic() + JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            warnings.warn(f"a vCPU of {self!r} waits for a page: left open", ResourceWarning, stacklevel=2)
            return
        self._stats = self.stats()
        for log in self._logs:
            log.close()
        try:
            self._machine.close()
        except BusyError:
            warnings.warn(f"a call of {self!r} is under way: left open", ResourceWarning, stacklevel=2)
            return
        if self._ring is not None:
            self._ring.close()
        try:
            self.memory.close()
        except BufferError:
            logger.debug("the memory of %r is still in use elsewhere; it goes with its last user", self)

    def _run_vcpu(self, number: int) -> None:
        # Signals are the main thread's: one that lands here would only break a KVM_RUN.
        synchronous = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.valid_signals()) - synchronous)
        try:
            while self._machine.run_vcpu(number):
                hints, ended, written = self._machine.take_hints(number)
                try:
                    self._wrote(written)
                    for epoch, runs in hints:
                        if self.on_hints is not None:
                            self.on_hints(epoch, runs)
                except Exception as error:
                    # The guest is not to blame, and must not be lost, for what its owner does.
                    logger.exception("a callback of %r failed", self)
                    self._fail(error)
                if ended:
                    with self._changed:
                        self._reported[number] = max(ended)
                        self._changed.notify_all()
        except Exception as error:
            logger.exception("vCPU %d of %r failed", number, self)
            self._fail(error)

    def _wrote(self, runs: Any) -> None:
        if runs is not None and len(runs) and self.on_vmm_write is not None:
            self.on_vmm_write(runs)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            if self.error is None:
                self.error = error
            self._changed.notify_all()

    def _raise_error(self) -> None:
        if self.error is None and self._machine.failed:
            # The machine knows before the vCPU's thread has got round to saying why.
            with self._changed:
                self._changed.wait_for(lambda: self.error is not None, JOIN_SECONDS)
        if self.error is not None:
            raise self.error
