"""Postcopy at the source: what is owed is pushed, requests are answered, until the destination has everything (D16)."""

from __future__ import annotations

import time

from pagecore import Bitmap
from pagecore.errors import PeerGoneError, ProtocolError
from pagecore.migrate.agreement import same_clock
from pagecore.migrate.answers import Answers
from pagecore.migrate.link import Link
from pagecore.migrate.sender import Outgoing
from pagecore.migrate.session import SourceSession
from pagecore.testing import compare_placed
from pagecore.wire import FrameType, decode_audit, decode_report, encode_page_set

__all__ = ["Serving"]


class Serving:
    """Serves the destination over one link.

    Parameters
    ----------
    session : SourceSession
    link : Link
    outgoing : Outgoing
    complete : bool
        The destination said over an earlier link that it has everything.
    """

    def __init__(self, session: SourceSession, link: Link, outgoing: Outgoing, *, complete: bool = False) -> None:
        self.complete = complete
        self._session = session
        self.link = link
        self._outgoing = outgoing
        self._answers = Answers(
            link,
            session.tracker,
            outgoing.urgent,
            session.answers,
            emulate_qemu=session.options.emulate_qemu,
        )
        link.watch(session.stop.check_given_up)

    def start(self) -> None:
        """Answer requests: the destination may fault on its first instruction."""
        if self._session.options.postcopy and not self.complete:
            self._answers.start()

    def phase(self) -> None:
        """Report that RUN is out."""
        self._session.phase("postcopy" if self._session.options.postcopy else "finish")

    def close(self) -> None:
        """Answer no more; what an answer took and could not send was put back."""
        self.link.urgent.hang_up()
        self._answers.close()

    def run(self) -> tuple[int, int]:
        """Until the destination has everything, and said with what content: pages compared, and pages wrong."""
        if not self.complete:
            self._push()
            self._finish()
        self._session.finished_at = time.monotonic()
        return self._audit()

    def running(self, first_instruction: object) -> None:
        """The guest runs over there since then."""
        session = self._session
        if session.running_at:
            return
        if not isinstance(first_instruction, float) or first_instruction <= 0:
            raise ProtocolError("first_instruction", f"{first_instruction!r} is no time")
        # Another machine has another clock: there it counts when its word came.
        session.running_at = first_instruction if same_clock(self.link.peer) else time.monotonic()
        downtime = session.running_at - session.paused_at
        session.reporter.event("running", downtime=downtime, first_instruction=session.running_at)

    def _push(self) -> None:
        """Send all that is owed on the bulk streams, while requests are answered beside it."""
        pause, tracker = self._session.pause, self._session.tracker
        while tracker.dirty_count:
            pause.hold(self.link, self.check, lambda: tracker.dirty_count)
            self.check()
            self._outgoing.send_owed(None, self.check, lambda: pause.wanted(self.link))

    def _finish(self) -> None:
        """D16: nothing is dirty; name what is still hinted, and answer until COMPLETE."""
        session, options = self._session, self._session.options
        hinted = Bitmap(session.guest.npages) if options.emulate_qemu else session.tracker.hinted_pages()
        if options.postcopy:
            self._outgoing.mark(FrameType.END)
        self.link.send(FrameType.FINISH, encode_page_set(hinted, generation=self.link.session.generation))
        asked, quiet_since = -1, 0.0
        while not self.complete:
            self.check(wait=0.05)
            if session.answers.requested != asked:
                asked, quiet_since = session.answers.requested, time.monotonic()
            if time.monotonic() > quiet_since + options.stall_timeout:
                raise PeerGoneError(f"the destination was silent for {options.stall_timeout:g} s")

    def check(self, wait: float = 0.0) -> None:
        """Look at everything that may have happened beside the bulk streams."""
        self._session.stop.check_given_up()
        # Asked first: a peer that is done says COMPLETE before it closes the urgent stream.
        error = self._answers.error
        if self.link.control.readable(wait):
            header, payload = self.link.receive()
            if header.type is FrameType.RUNNING and not self._session.running_at:
                self.running(decode_report(payload).get("first_instruction"))
            elif header.type is FrameType.COMPLETE and self._session.running_at:
                self.complete = True
            else:
                raise ProtocolError("type", f"{header.type.name} has no place here")
        elif error is not None:
            raise error

    def _audit(self) -> tuple[int, int]:
        """Compare what the destination placed with the frozen memory."""
        guest = self._session.guest
        _, payload = self.link.expect(FrameType.AUDIT)
        audit = decode_audit(payload, guest.npages, generation=self.link.session.generation)
        # What the guest held free at the switch may have been filled with zeros, whatever it has here.
        audit.zeros.andnot(self._session.free)
        wrong = compare_placed(guest.memory, *audit)
        return audit.content.count() + audit.zeros.count(), wrong.count()
