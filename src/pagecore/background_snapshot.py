"""BackgroundSnapshot: an image of memory at one moment, saved while it is written to."""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import time
import warnings
from typing import Any, NoReturn, Self

from pagecore._snapshot_traps import SnapshotProgress, SnapshotTraps
from pagecore._uffd_types import Feature
from pagecore.errors import ClosedError

__all__ = ["BackgroundSnapshot", "SnapshotProgress"]


class BackgroundSnapshot:
    """A consistent image of memory at one moment, saved in the background while it is written to.

    The moment is the constructor's: **whoever writes to the memory is held from before the call until it returns** (a
    millisecond for each 40 MiB, and much less for huge pages), or the image would be of several moments. Then they go
    on; whoever writes to a page that is not saved yet waits until it is, which is at once::

        guest.pause()
        snapshot = BackgroundSnapshot(guest.memory, file)
        guest.resume()
        with snapshot:
            while not snapshot.wait(timeout=1.0):
                print(snapshot.progress)

    Parameters
    ----------
    memory : writable buffer
        Page-aligned private anonymous or shared memory, also of a KVM guest. It has to stay mapped, and cannot be
        closed, until the snapshot is closed. Nobody may write to shared memory through another mapping.
    sink : writable buffer, file descriptor, or object with ``fileno()``
        As many bytes as `memory`; or a regular file, which is emptied first and gets the size of `memory`: pages that
        were never populated are holes of it. Nothing is synced to disk. It takes 2 MiB of memory, and two bits a page.

    Attributes
    ----------
    size : int
        Pages.

    Raises
    ------
    UnsupportedError
        The kernel or this user lacks something.
    ValueError
        The memory is read-only, misaligned, or has huge pages of hugetlb; the sink is too small, overlaps it, is no
        regular file, or cannot be written to at any offset.
    UffdError
        The kernel refused for another reason (EBUSY: registered with another userfaultfd, as by a dirty log).

    Notes
    -----
    Releases the GIL, and its threads never need it. Thread-safe. Linux 5.7; 5.19 for shared memory. A discard
    (MADV_DONTNEED, MADV_FREE, a balloon) waits until everything is saved, and from then on so does every write to a
    page that is not saved yet (``progress.held``): hold discards back, or cancel. Who writes to pages that were pinned
    before (io_uring's registered buffers, RDMA, VFIO) is not caught, and has to be held until the end. Holes of shared
    memory are populated.
    """

    def __init__(self, memory: mmap.mmap | bytearray | memoryview, sink: Any) -> None:
        size = memoryview(memory).nbytes
        buffer, file = _check_sink(sink, size)
        self._fd = -1
        self._process = os.getpid()
        self._traps = SnapshotTraps()
        try:
            self._traps.open(memory, Feature(0))
            if buffer is None:
                self._fd = os.dup(file)
                os.ftruncate(self._fd, 0)
                os.ftruncate(self._fd, size)
            self._traps.plan(buffer, self._fd)
            self._traps.start("snapshot-faults", self._traps.run)
            self._traps.arm()
            self._traps.start("snapshot", self._traps.save_all)
        except BaseException:
            self.close()
            raise
        self.size = size // mmap.PAGESIZE

    def __enter__(self) -> Self:
        if self.closed:
            raise ClosedError("the snapshot is closed")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        """Wait for its end, which may be an error, and close it; after an exception, cancel it.

        In a forked child it closes the child's copy alone.
        """
        try:
            if kind is None and os.getpid() == self._process:
                self.wait()
        finally:
            self.close()

    def __del__(self) -> None:
        if not hasattr(self, "_traps") or self._traps.closed:
            return
        try:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
        finally:
            self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a BackgroundSnapshot is memory of this process and cannot be pickled")

    def __repr__(self) -> str:
        return f"<BackgroundSnapshot of {self.size} pages, {self.state}>"

    @property
    def closed(self) -> bool:
        """bool: close() was called."""
        return self._traps.closed

    @property
    def state(self) -> str:
        """str: ``"running"``, ``"complete"``, ``"failed"`` or ``"cancelled"``."""
        return self._traps.state

    @property
    def progress(self) -> SnapshotProgress:
        """SnapshotProgress: how far it is."""
        return self._traps.progress

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything is saved.

        Parameters
        ----------
        timeout : float or None
            Seconds. None: for as long as it takes.

        Returns
        -------
        bool
            True: the sink holds the image. False at the time-out.

        Raises
        ------
        UffdError
            The sink failed (a disk is full), or the kernel refused something. Nothing is protected any more, and what
            was saved is no image.
        PagecoreError
            Pages were discarded before they were saved.
        ClosedError
            It was cancelled.
        UnsupportedError
            In a forked child: its end is not seen here.

        Notes
        -----
        Releases the GIL; signals are handled. Thread-safe.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._traps.wait(1.0 if deadline is None else deadline - time.monotonic()):
            if deadline is not None and time.monotonic() >= deadline:
                return False
        self._traps.check()
        return True

    def cancel(self) -> None:
        """Give it up: nothing is protected any more when this returns. Idempotent; without effect once it has ended.

        Notes
        -----
        Releases the GIL. Thread-safe with everything.
        """
        self._traps.cancel()

    def close(self) -> None:
        """Cancel it if it has not ended, end its threads and let go of memory and sink. Idempotent.

        Raises
        ------
        BusyError
            A thread has not ended within a minute: its disk does not answer. Nothing is protected any more, and it may
            be called again.

        Notes
        -----
        Releases the GIL while it waits. In a forked child it closes the child's copy alone.
        """
        self._traps.cancel()
        self._traps.close()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _check_sink(sink: Any, size: int) -> tuple[memoryview | None, int]:
    """The sink as a buffer, or as a file; refused before anything is done to it if it can be neither."""
    try:
        view = memoryview(sink)
    except TypeError:
        file = sink if isinstance(sink, int) else sink.fileno()
    else:
        if view.readonly or not view.c_contiguous:
            raise ValueError("the sink must be a writable, contiguous buffer")
        if view.nbytes < size:
            raise ValueError(f"a sink of {view.nbytes} bytes does not hold {size} bytes of memory")
        return view, -1
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise ValueError(f"descriptor {file} is no regular file")
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    if flags & os.O_ACCMODE == os.O_RDONLY:
        raise ValueError(f"descriptor {file} was opened for reading alone")
    if flags & os.O_APPEND:
        raise ValueError(f"descriptor {file} was opened with O_APPEND, which ignores offsets")
    return None, file
