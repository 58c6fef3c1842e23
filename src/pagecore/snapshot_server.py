"""SnapshotServer: a page-fault handler for Firecracker and whoever speaks its handshake."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import stat
import struct
import threading
from types import TracebackType
from typing import Any, Final, Literal, Self

from pagecore import (
    MemoryKind,
    PagecoreError,
    PeerGoneError,
    PlacementLoop,
    PlacementStats,
    Region,
    Userfaultfd,
)
from pagecore.firecracker import GuestRegion, parse_handshake, receive_handshake
from pagecore.page_source import FileSource

__all__ = ["SnapshotServer"]

_logger = logging.getLogger("pagecore.serve")

# How often a session looks whether its loop has failed; the guest's end is seen at once.
CHECK_SECONDS: Final = 0.5


class SnapshotServer:
    """Serve the memory of guests from a snapshot file, each guest in a session of its own.

    Parameters
    ----------
    socket_path : path
        Where to listen. A socket that nobody listens at any more is replaced.
    snapshot_path : path
        The content of the guests' memory.
    prefetch : bool
        Place all of it in the background; otherwise only what is touched.
    on_lost : {"poison", "stall"}
        What becomes of pages that nobody can supply: a read that fails, or the rest of them when the server stops while
        the guest lives. A SIGBUS for whoever touches them, or an endless wait; never zeros.
    threads : int
        Threads of each session that read the file for faults, and as many that prefetch.
    handshake_timeout : float
        Seconds that a VMM has for its handshake.

    Raises
    ------
    ValueError
        An option is outside its bounds.
    OSError
        The snapshot cannot be read, or the address is in use.

    Notes
    -----
    Faults are served by native threads without the GIL. The file is read by ``pread`` and never mapped. A descriptor
    must report discards (Firecracker 1.12 and newer always have it do so), and its memory be anonymous or huge pages.
    """

    def __init__(
        self,
        socket_path: str | os.PathLike[str],
        snapshot_path: str | os.PathLike[str],
        *,
        prefetch: bool = False,
        on_lost: Literal["poison", "stall"] = "poison",
        threads: int = 1,
        handshake_timeout: float = 10.0,
    ) -> None:
        if on_lost not in ("poison", "stall"):
            raise ValueError(f"on_lost {on_lost!r} is neither 'poison' nor 'stall'")
        if threads < 1:
            raise ValueError(f"threads {threads} is less than 1")
        if not 0 < handshake_timeout <= 3600:
            raise ValueError(f"handshake timeout {handshake_timeout} is outside (0, 3600]")
        self.socket_path = os.fspath(socket_path)
        self.snapshot_path = os.fspath(snapshot_path)
        self.prefetch = prefetch
        self.on_lost = on_lost
        self.threads = threads
        self.handshake_timeout = handshake_timeout
        self._sessions: dict[int, tuple[threading.Thread, socket.socket]] = {}
        self._lock = threading.Lock()  # guards _sessions; taken inside nothing
        self._process = os.getpid()  # whose sessions these are: what a forked child does must not end them
        self._count = 0
        # Every wait of every thread polls it; nobody reads it, so that all of them end.
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            with open(self.snapshot_path, "rb"):
                pass
            self._listener = _listen(self.socket_path)
        except BaseException:
            os.close(self._stop_fd)
            raise

    def serve(self) -> None:
        """Accept guests until `stop` is called, by a thread or a signal handler, and their sessions have ended.

        In a forked child the guests that come then are its own; those of its parent stay there.
        """
        if os.getpid() != self._process:
            self._start_anew()
        try:
            while not self._wait(self._listener)[0]:
                try:
                    stream, _ = self._listener.accept()
                except OSError as error:
                    # Out of descriptors, or a connection that is gone again: the guests that are here go on.
                    _logger.warning("accept: %s", error)
                    self._wait(timeout=0.1)
                    continue
                self._start(stream)
        finally:
            self._end_sessions()

    def stop(self) -> None:
        """Have `serve` return; for signal handlers too. Pages that are missing then are lost: see `on_lost`.

        In a forked child it does nothing, unless that serves itself.
        """
        if self._stop_fd >= 0 and os.getpid() == self._process:
            os.eventfd_write(self._stop_fd, 1)

    def close(self) -> None:
        """Stop, and give the socket back. Idempotent. In a forked child it closes the child's copies alone."""
        inherited = os.getpid() != self._process
        if inherited:
            self._drop_sessions()
        else:
            self._end_sessions()
        if self._listener.fileno() >= 0:
            self._listener.close()
            if not inherited:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.socket_path)
        number, self._stop_fd = self._stop_fd, -1
        if number >= 0:
            os.close(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def sessions(self) -> int:
        """Guests that are being served."""
        return len(self._sessions)

    def _end_sessions(self) -> None:
        self.stop()
        with self._lock:
            sessions = list(self._sessions.values())
        for _, stream in sessions:
            # One that still waits for its handshake waits for this alone.
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
        for thread, _ in sessions:
            thread.join()

    def _drop_sessions(self) -> None:
        """In a forked child: the threads are not here, one may hold the lock, and the connections are the parent's."""
        for _, stream in self._sessions.values():
            stream.close()
        self._sessions = {}

    def _start_anew(self) -> None:
        """Daemons fork once the address is theirs."""
        self._drop_sessions()
        self._lock = threading.Lock()
        os.close(self._stop_fd)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._process = os.getpid()

    def _wait(self, other: Any = None, timeout: float | None = None) -> tuple[bool, bool]:
        """Wait until the other is readable, or the time is over: whether the server is to stop, and whether it is."""
        ready = _readable(self._stop_fd, *([] if other is None else [other]), timeout=timeout)
        return self._stop_fd in ready, any(number != self._stop_fd for number in ready)

    def _start(self, stream: socket.socket) -> None:
        self._count += 1
        number = self._count
        thread = threading.Thread(
            target=self._session, args=(number, stream), name=f"pagecore-guest-{number}", daemon=True
        )
        with self._lock:
            self._sessions[number] = (thread, stream)
        try:
            thread.start()
        except (RuntimeError, MemoryError) as error:
            # No thread is to be had: this guest sees its connection end, and the others go on.
            with self._lock:
                del self._sessions[number]
            stream.close()
            _logger.error("session %d: refused: %s", number, error)

    def _session(self, number: int, stream: socket.socket) -> None:
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(stream)
                self._serve_guest(number, stream, stack)
        except (PagecoreError, ValueError, OSError, RuntimeError, MemoryError) as error:
            # RuntimeError: the loop's threads could not be started.
            # The guest's page faults wait: its VMM holds the descriptor, and sees that the connection has ended.
            # As text: of whoever keeps the record, the error's frames would keep the session's descriptors, too.
            _logger.error("session %d: refused: %s", number, str(error))
        finally:
            with self._lock:
                del self._sessions[number]

    def _serve_guest(self, number: int, stream: socket.socket, stack: contextlib.ExitStack) -> None:
        body, descriptor = receive_handshake(stream, timeout=self.handshake_timeout)
        try:
            guests = parse_handshake(body, snapshot_size=os.stat(self.snapshot_path).st_size)
            uffd = Userfaultfd.adopt(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        stack.enter_context(uffd)
        process, ended = _peer(stream, stack)
        regions = [_region(uffd, index, guest, process) for index, guest in enumerate(guests)]
        source = FileSource(
            self.snapshot_path,
            [(index, guest.offset, guest.size) for index, guest in enumerate(guests)],
            page_size=guests[0].page_size,
        )
        with contextlib.ExitStack() as held:
            # D12: where the VMM holds no descriptor itself, the last close would make zeros of what is missing. Taken
            # before anything is served: at the end there may be none to be had.
            held.callback(os.close, os.dup(uffd.fileno()))
            loop = PlacementLoop(
                regions,
                source,
                threads=self.threads,
                on_lost=self.on_lost,
                # D12: nobody supplies them any more then, and without our descriptor they might read as zeros.
                on_stop="poison" if self.on_lost == "poison" else "wake",
                background=self.prefetch,
                name=f"guest {number}",
            )
            size = sum(guest.size for guest in guests)
            _logger.info("session %d: process %d, %d bytes in %d regions", number, process, size, len(regions))
            with loop:
                self._watch(number, loop, ended)
            if not _is_readable(ended) and any(len(loop.unsettled(region_id=region.id)) for region in regions):
                # By policy, or since this kernel has no poison, what is missing stays so until this process ends.
                held.pop_all()
        _logger.info("session %d: %s", number, _summary(loop.stats()))

    def _watch(self, number: int, loop: PlacementLoop, ended: Any) -> None:
        """Until the guest has ended, or the server is to stop."""
        error: PagecoreError | None = None
        while not any(self._wait(ended, CHECK_SECONDS)) and not isinstance(loop.error, PeerGoneError):
            if error is None and (error := loop.error) is not None:
                _logger.error("session %d: %s", number, error)


def _readable(*files: Any, timeout: float | None) -> list[int]:
    """The descriptors of those that are readable, once there is one or the time is over."""
    # Not select(): with some hundred guests there are descriptors above 1023.
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    return [number for number, _ in poll.poll(None if timeout is None else timeout * 1000)]


def _is_readable(ended: Any) -> bool:
    return bool(_readable(ended, timeout=0))


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            listener.bind(path)
        except OSError:
            if not _stale(path):
                raise
            os.unlink(path)
            listener.bind(path)
        listener.listen(64)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _stale(path: str) -> bool:
    """Whether a socket is there that nobody listens at."""
    if not os.path.lexists(path) or not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _peer(stream: socket.socket, stack: contextlib.ExitStack) -> tuple[int, Any]:
    """The process at the other end (0: of another namespace), and what becomes readable when it ends.

    Firecracker before 1.12 closes the connection at once: its end means something only where no process can be seen.
    """
    credentials = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    process: int = struct.unpack("3i", credentials)[0]
    if process > 0:
        try:
            ended = os.pidfd_open(process)
        except ProcessLookupError:
            raise PeerGoneError(f"process {process} has ended") from None
        stack.callback(os.close, ended)
        return process, ended
    return 0, stream


def _region(uffd: Userfaultfd, index: int, guest: GuestRegion, process: int) -> Region:
    """The region that the VMM has registered, checked against its mappings where they may be read."""
    options: dict[str, Any] = {"page_size": guest.page_size, "region_id": index}
    try:
        if process:
            return uffd.region_at(guest.address, guest.size, process=process, **options)
    except OSError as error:
        _logger.warning("the mappings of process %d cannot be checked: %s", process, error)
    kind = MemoryKind.ANONYMOUS if guest.page_size == 4096 else MemoryKind.HUGE
    return uffd.region_at(guest.address, guest.size, kind=kind, **options)


def _summary(stats: PlacementStats) -> str:
    return (
        f"ended; {stats.placed} pages placed, {stats.zeroed} zero, {stats.refilled} filled after a discard, "
        f"{stats.removed} discarded, {stats.poisoned} lost, {stats.faults} faults"
    )
