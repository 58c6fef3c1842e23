"""A pause of the transfer: nothing of the bulk leaves the source, and signs of life say that it is still there."""

from __future__ import annotations

import time
from collections.abc import Callable

from pagecore.errors import ProtocolError
from pagecore.migrate.link import TICK, Link
from pagecore.migrate.progress import Reporter, Stop
from pagecore.wire import FrameType, decode_report, encode_report

__all__ = ["Pause", "SignsOfLife"]


class Pause:
    """The source's side, over all generations of the link. One thread drives the source, and asks here.

    Parameters
    ----------
    stop : Stop
        Says whether it is to pause.
    reporter : Reporter
    """

    def __init__(self, stop: Stop, reporter: Reporter) -> None:
        self._stop = stop
        self._reporter = reporter
        self._asked = False
        self._since: float | None = None
        self._before = 0.0

    @property
    def seconds(self) -> float:
        """How long it has paused so far."""
        return self._before + (time.monotonic() - since if (since := self._since) is not None else 0.0)

    def wanted(self, link: Link) -> bool:
        """Whether nothing more is to leave on the bulk streams of this link."""
        if not self._stop.paused:
            return False
        if not link.capabilities.pause:
            # W2: it would take the silence for a lost link.
            self._stop.resume()
            self._reporter.event("not_paused", reason="the destination does not know of pauses")
            return False
        self._asked = True
        return True

    def hold(self, link: Link, look: Callable[[float], None], owed: Callable[[], object]) -> bool:
        """Stand still for as long as it is wanted and there is something to hold back, once the senders are quiet.

        Before the switch there always is: the guest writes on, and the switch itself is held back. After it the
        requests of the guest, which are answered, may leave nothing that is owed; then the pause ends by itself, and
        the migration with it, as nobody would see a difference but that it waits.

        Parameters
        ----------
        link : Link
        look : callable
            Called again and again with how many seconds it may wait for something to happen; what it raises ends the
            pause.
        owed : callable
            Whether anything is left to hold back.

        Returns
        -------
        bool
            Whether a pause was wanted since the last call, be it for an instant.
        """
        while self.wanted(link) and owed():
            if self._since is None:
                self._since = time.monotonic()
                self._stop.hold_clock()
                self._reporter.event("paused")
            # Said by the thread that would send: one that hangs, or is gone, says nothing.
            link.send(FrameType.ALIVE, encode_report({"paused": True}))
            look(TICK)
        if self._since is not None:
            seconds, self._since = time.monotonic() - self._since, None
            self._before += seconds
            self._stop.release_clock()
            link.send(FrameType.ALIVE, encode_report({"paused": False}))
            self._reporter.event("resumed", seconds=seconds)
        asked, self._asked = self._asked, False
        return asked


class SignsOfLife:
    """The destination's side: what a source that pauses says.

    Parameters
    ----------
    stop : Stop
        Its clock stands still meanwhile.
    reporter : Reporter
    """

    def __init__(self, stop: Stop, reporter: Reporter) -> None:
        self._stop = stop
        self._reporter = reporter
        self._paused = False

    def hear(self, payload: bytes) -> None:
        """Take in what an ALIVE frame says.

        Raises
        ------
        ProtocolError
        """
        paused = decode_report(payload).get("paused")
        if not isinstance(paused, bool):
            raise ProtocolError("paused", f"{paused!r} is neither true nor false")
        if paused is self._paused:
            return
        self._paused = paused
        if paused:
            self._stop.hold_clock()
            self._reporter.event("paused")
        else:
            self._stop.release_clock()
            self._reporter.event("resumed")
