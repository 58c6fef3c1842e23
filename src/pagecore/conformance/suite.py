"""Run the table against a handler."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Final, Literal, Self

from pagecore import PagecoreError
from pagecore.conformance.rows import Row
from pagecore.conformance.snapshot import NPAGES, PAGE, Snapshot, make_snapshot
from pagecore.conformance.table import ROWS

__all__ = ["Verdict", "run"]

MOST_SECONDS: Final = 3600.0
RESTART_SECONDS: Final = 0.02


@dataclass(frozen=True)
class Verdict:
    """What came of one row.

    Attributes
    ----------
    row : Row
        The line of the table.
    result : str
        ``pass``, ``fail`` or ``not applicable``.
    seen : str
        What the handler did.
    seconds : float
        How long the row took.
    """

    row: Row
    result: Literal["pass", "fail", "not applicable"]
    seen: str
    seconds: float


def run(
    socket_path: str | os.PathLike[str],
    snapshot_path: str | os.PathLike[str],
    *,
    rows: Iterable[str] | None = None,
    command: str | Sequence[str] | None = None,
    keep: bool = False,
    patience: float = 2.0,
    deadline: float = 30.0,
) -> Iterator[Verdict]:
    """Play every row against the handler at a socket.

    Parameters
    ----------
    socket_path : path
        Where the handler listens.
    snapshot_path : path
        The snapshot that it serves, as `make_snapshot` wrote it. One row cuts the file; it is put right again.
    rows : iterable of str, optional
        Names of the rows to play; all by default.
    command : str or sequence of str, optional
        Starts the handler, anew for each row. Without it one must listen already, and serve a session for each row.
    keep : bool
        The command's handler serves one session after another: start it again only when it has ended.
    patience : float
        Seconds after which a thread that still waits for a page is stuck.
    deadline : float
        Seconds after which a row is ended, whatever it waits for.

    Yields
    ------
    Verdict
        One for each row, in the order of the table.

    Raises
    ------
    ValueError
        The snapshot is another, a row has no such name, or a time is outside its bounds.
    PagecoreError
        The process that plays the guests has ended.

    Notes
    -----
    The guests live in processes of their own: the caller's memory is not touched, and what hangs there ends there.
    """
    chosen = list(ROWS if rows is None else rows)
    for name in chosen:
        if name not in ROWS:
            raise ValueError(f"no row is called {name!r}: {', '.join(ROWS)}")
    for name, value in (("patience", patience), ("deadline", deadline)):
        if not 0 < value <= MOST_SECONDS:
            raise ValueError(f"{name} {value} is outside (0, {MOST_SECONDS:g}]")
    Snapshot(snapshot_path)
    socket_path, snapshot_path = os.fspath(socket_path), os.fspath(snapshot_path)
    arguments = shlex.split(command) if isinstance(command, str) else command
    with _Player() as player, _Handler(socket_path, arguments, patience, keep=keep) as handler:
        for name in chosen:
            began = time.monotonic()
            handler.ensure()
            answer = player.play(
                {
                    "row": name,
                    "socket": socket_path,
                    "snapshot": snapshot_path,
                    "patience": patience,
                    "deadline": deadline,
                    "may_kill": handler.ours,
                },
                handler if ROWS[name].restart else None,
            )
            result, seen = _judge(ROWS[name], answer, handler, deadline)
            if os.stat(snapshot_path).st_size != NPAGES * PAGE:
                make_snapshot(snapshot_path)
            yield Verdict(ROWS[name], result, seen, time.monotonic() - began)


def _judge(
    row: Row, answer: dict[str, Any], handler: _Handler, deadline: float
) -> tuple[Literal["pass", "fail", "not applicable"], str]:
    result, seen = answer["result"], answer["seen"]
    if result == "killed":
        if answer["signal"] == signal.SIGBUS:
            return ("pass" if row.sigbus else "fail"), "SIGBUS: the guest's access failed"
        if answer["signal"] == signal.SIGKILL:
            return "fail", f"the row did not end within {deadline:g} s"
        return "fail", f"the guest was ended by signal {answer['signal']}"
    if result == "ended":
        status, words = handler.ending()
        if status is None:
            return "not applicable", "the handler ended, and was not started by the suite: see --command"
        return ("pass", "the handler ended by itself") if status == 0 else ("fail", words)
    if result == "hung up":
        # Often because it is ending, and its last words say why.
        _, words = handler.ending()
        return "fail", f"{seen}: {words}" if words else seen
    if result == "fail" and not handler.alive:
        return "fail", f"{seen}: {handler.ending()[1]}" if handler.ours else seen
    return result, seen


class _Player:
    """The process that plays the guests."""

    def __enter__(self) -> Self:
        source = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pagecore.conformance.player"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A library that starts threads of its own would make its forks unsafe.
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        return self

    def play(self, order: dict[str, Any], restarted: _Handler | None) -> dict[str, Any]:
        """Have one row played; bounded by its deadline. Meanwhile a handler is started again when it ends, if given."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            while restarted is not None and not select.select([self._process.stdout], [], [], RESTART_SECONDS)[0]:
                restarted.revive()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PagecoreError(f"the process that plays the guests ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if kind is not None:
            self._process.kill()
        self._process.wait()
        self._process.stdout.close()


class _Handler:
    """The handler: somebody else's, or a process that the suite starts and ends."""

    def __init__(self, socket_path: str, arguments: Sequence[str] | None, patience: float, *, keep: bool) -> None:
        self._socket_path = socket_path
        self._arguments = arguments
        self._patience = patience
        self._keep = keep
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None

    @property
    def ours(self) -> bool:
        """Whether the suite starts it."""
        return self._arguments is not None

    @property
    def alive(self) -> bool:
        """False where it is known to have ended."""
        return self._process is None or self._process.poll() is None

    def ensure(self) -> None:
        """Have one ready for the next row."""
        if not (self._keep and self._process is not None and self.alive):
            self._start()

    def revive(self) -> None:
        """Start another when it has ended."""
        if not self.alive:
            self._start()

    def _start(self) -> None:
        if self._arguments is None:
            return
        self._end()
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(self._socket_path).st_mode):
                os.unlink(self._socket_path)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed by _end
        self._process = subprocess.Popen(
            self._arguments, stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said
        )

    def ending(self) -> tuple[int | None, str]:
        """Its exit status, and the last thing it said."""
        if self._process is None:
            return None, ""
        try:
            status = self._process.wait(self._patience)
        except subprocess.TimeoutExpired:
            return None, ""
        assert self._said is not None
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return status, f"the handler ended with {how}" + (f" ({lines[-1].strip()})" if lines else "")

    def _end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.send_signal(signal.SIGCONT)  # a row that failed may have left it paused
            try:
                self._process.wait(self._patience)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._said is not None:
            self._said.close()
        self._process = self._said = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
