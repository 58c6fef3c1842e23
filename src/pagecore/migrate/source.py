"""The source's half of a migration: precopy, the switch, postcopy over as many links as it takes, and the way back."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from pagecore import Bitmap, Command, HintSession, PageTracker
from pagecore.errors import PagecoreError
from pagecore.migrate.agreement import describe
from pagecore.migrate.link import Link, RemoteError
from pagecore.migrate.options import PAGE_SIZE, Options
from pagecore.migrate.pause import Pause
from pagecore.migrate.precopy import precopy
from pagecore.migrate.progress import Cancelled, Reporter, Stop, reason_of
from pagecore.migrate.recovery import LOST, Resumed, Returning, may_return
from pagecore.migrate.rendezvous import connect
from pagecore.migrate.sender import Outgoing, Pacer
from pagecore.migrate.serving import Serving
from pagecore.migrate.session import SourceSession
from pagecore.migrate.switch import switch
from pagecore.migrate.transport import Transport
from pagecore.migrate.verdict import OF_DESTINATION, OF_SOURCE, hear, tell
from pagecore.testing import open_guest
from pagecore.wire import Capabilities, FrameType, Hello, encode_report

__all__ = ["Source"]

log = logging.getLogger("pagecore.migrate")

SELF_CHECK_TIMEOUT: Final = 3.0


class Source:
    """One migration, seen from where the guest runs first.

    Parameters
    ----------
    options : Options
    address, session_id : str
        Where the destination listens, and the name of the session.
    reporter : Reporter
    stop : Stop
    transport : Transport, optional
    """

    def __init__(
        self,
        options: Options,
        address: str,
        session_id: str,
        reporter: Reporter,
        stop: Stop,
        *,
        transport: Transport | None = None,
    ) -> None:
        self._options = options
        self._address = address
        self._session_id = session_id
        self._reporter = reporter
        self._stop = stop
        self._transport = transport or Transport()
        # Once RUN was handed to the link the guest may run over there, and never again here, unless the
        # destination denies having run it (S9).
        self._handed = False
        # The destination said that it has everything: losing the source does no harm any more.
        self._complete = False
        self._link: Link | None = None
        self._hints: HintSession | None = None
        # Whether all is right, once that is known.
        self._good: bool | None = None

    def run(self) -> bool:
        """Migrate; True where it was completed and nothing was found wrong."""
        options = self._options
        with contextlib.ExitStack() as stack:
            stack.callback(self._hang_up)
            guest = self._guest = stack.enter_context(
                contextlib.closing(
                    open_guest(
                        options.size,
                        kind=options.guest,
                        role="source",
                        seed=options.seed,
                        vcpus=options.vcpus,
                        free_share=options.free_share,
                        dirty_rate=options.dirty_rate,
                        dirty_log=options.dirty_log,
                    )
                )
            )
            self._reporter.event(
                "guest", kind=guest.kind, reason=guest.reason, npages=guest.npages, dirty_log=guest.log_kind
            )
            session = SourceSession(
                options=options,
                reporter=self._reporter,
                stop=self._stop,
                pause=Pause(self._stop, self._reporter),
                guest=guest,
                tracker=PageTracker(guest.npages, dirty_log=guest.dirty_log),
                memory=stack.enter_context(memoryview(guest.memory).toreadonly()),
                pacer=Pacer(options.bandwidth),
                free=Bitmap(guest.npages),
            )
            session.phase("boot")
            guest.boot()
            # S12: no log sees what the machine itself writes.
            guest.on_vmm_write = session.tracker.mark
            guest.run()
            stack.enter_context(self._reporter.sampling(session.counters))
            return self._migrate(session)

    def _migrate(self, session: SourceSession) -> bool:
        guest = self._guest
        try:
            self._stop.check()
            session.phase("connect")
            link = self._link = connect(
                self._address,
                self._hello(),
                transport=self._transport,
                timeout=self._stop.remaining(),
                patience=self._options.stall_timeout,
                check=self._stop.check,
            )
            if self._options.hints:
                # S12: the guest's machine marks what it writes (on_vmm_write), so that hints are safe beside it.
                self._hints = session.tracker.hint_session(
                    promise="armed", marked=guest.dirty_log.misses, on_command=self._announce
                )
                guest.on_hints = _taking(self._hints)
            outgoing = session.outgoing(link)
            precopy(session, link, outgoing, self._hints)
            handed_over = switch(session, link, outgoing, self._hints)
            # From here on it takes two wishes for an end to get one, and no time is too long (S9).
            return self._hand_over(session, link, outgoing, handed_over)
        # Whatever it was, even a fault of this program: the guest is on one side, and this decides on which.
        except Exception as error:
            _log_surprise(error)
            if self._good is not None:
                # All of it is over there, and was found right or wrong: only the last word was not heard.
                self._reporter.event("peer", error=str(error))
                return self._good
            # S9: a destination that ends and says that it has not run the guest is one that never will.
            if not self._handed or (isinstance(error, RemoteError) and error.ran is False):
                return self._keep_guest(error)
            return self._lose_guest(session, error)

    def _hello(self) -> Hello:
        options, guest = self._options, self._guest
        return Hello(
            stream="control",
            session_id=self._session_id,
            generation=0,
            page_size=PAGE_SIZE,
            regions={0: guest.npages},
            capabilities=Capabilities(duplicates=options.duplicates, recovery=may_return(options), pause=True),
            details=describe(options, guest.kind),
            streams=options.streams,
        )

    def _announce(self, command: Command, epoch: int) -> None:
        self._guest.announce(command, epoch)
        self._reporter.event("hints", command=command.name, epoch=epoch)

    def _hang_up(self) -> None:
        if self._link is not None:
            self._link.close()

    # ---------------------------------------------------------------------------------------------- postcopy

    def _hand_over(self, session: SourceSession, link: Link, outgoing: Outgoing, handed_over: dict[str, Any]) -> bool:
        """RUN, and everything after it, over as many links as it takes; whether nothing was found wrong."""
        returning = Returning(session, self._address, self._hello(), self._transport)
        resumed: Resumed | None = None
        while True:
            try:
                serving = Serving(session, link, outgoing, complete=resumed is not None and resumed.complete)
                return self._serve(session, serving, handed_over, resumed)
            except LOST as error:
                # S9: the senders are quiet before anything is said about what arrived.
                resumed = returning.come_back(link, error)
            link = self._link = resumed.link
            if not resumed.ran:
                # S9: it denies having run the guest, and a RUN of an older generation that is still on its way is
                # refused there: whoever wants an end may have the guest back.
                self._handed = False
                self._stop.check()
            outgoing = session.outgoing(link)

    def _serve(
        self, session: SourceSession, serving: Serving, handed_over: dict[str, Any], resumed: Resumed | None
    ) -> bool:
        """Serve the destination over one link; the senders are quiet when this returns or raises."""
        link = serving.link
        try:
            serving.start()
            if resumed is not None:
                if resumed.ran:
                    serving.running(resumed.first_instruction)
                # S9: the acknowledgement, after which the destination asks again for what it still misses.
                link.send(FrameType.RESUME, encode_report({}))
            if resumed is None or not resumed.ran:
                self._handed = True
                link.send(FrameType.RUN, encode_report(handed_over))
                serving.phase()
            good = self._result(session, *serving.run())
            tell(link, self._found, OF_SOURCE)
            self._reporter.event("peer", result=hear(link, OF_DESTINATION))
            return good
        finally:
            serving.close()
            self._complete = self._complete or serving.complete

    # ----------------------------------------------------------------------------------------------- results

    def _result(self, session: SourceSession, pages: int, wrong: int) -> bool:
        if self._good is not None:
            return self._good
        stats = self._guest.stats()
        self._found: dict[str, Any] = {
            **session.counters(),
            "downtime": session.running_at - session.paused_at,
            "total_time": session.finished_at - session.started_at,
            "audit_pages": pages,
            "audit_wrong": wrong,
            "self_check_errors": stats.self_check_errors,
        }
        self._reporter.event(
            "result",
            **self._found,
            answers=dataclasses.asdict(session.answers),
            stale_hints=self._hints.stale if self._hints is not None else 0,
            self_checks=stats.self_checks,
        )
        self._good = wrong == 0 and stats.self_check_errors == 0
        return self._good

    def _keep_guest(self, error: Exception) -> bool:
        """The switch did not come: the guest goes on here, and proves that it does."""
        link, guest, hints = self._link, self._guest, self._hints
        guest.on_hints = None
        problems: list[Exception] = []
        # Nothing keeps the guest waiting, not even the peer's reason; and no step fails for another's problem.
        with _kept(problems):
            guest.resume()
        with _kept(problems):
            guest.throttle(0)
        if hints is not None:
            # S5: exactly one DONE, on this side now, where the guest runs.
            with _kept(problems):
                if hints.state.name == "HANDED_OVER":
                    hints.take_back()
                hints.finish()
        if link is not None:
            if not isinstance(error, Cancelled):
                with _kept(problems):
                    error = link.explain(error)
            with _kept(problems):
                link.fail(FrameType.ABORT, f"the source ended the migration: {reason_of(error) or 'cancelled'}")
                link.close()
        with _kept(problems):
            self._self_check()
        self._reporter.event(
            "failed",
            cancelled=isinstance(error, Cancelled),
            error=reason_of(error),
            kind=type(error).__name__,
            guest="source",
            self_check=not problems,
            problem=str(problems[0]) if problems else "",
        )
        return False

    def _self_check(self) -> None:
        """One more round of the guest's own checks, after all that happened."""
        before = self._guest.stats()
        deadline = time.monotonic() + SELF_CHECK_TIMEOUT
        while True:
            stats = self._guest.stats()
            if self._guest.error is not None:
                raise self._guest.error
            if stats.self_check_errors:
                raise PagecoreError(f"the guest found its memory wrong: {stats.first_error}")
            checked = stats.self_checks - before.self_checks
            # As many checks as it holds pages; a slow guest, as many as it makes in the time there is.
            late = time.monotonic() >= deadline
            if checked >= self._guest.npages - stats.free_pages or (late and checked):
                self._reporter.event("self_check", pages=checked)
                return
            if late:
                raise PagecoreError("the guest did not go on: it checked no page")
            time.sleep(0.005)

    def _lose_guest(self, session: SourceSession, error: Exception) -> bool:
        """RUN is out: whatever happened, the guest does not run here again (S9)."""
        link = self._link
        assert link is not None
        error = link.explain(error)
        link.fail(FrameType.ERROR, f"the source failed: {reason_of(error)}")
        self._reporter.event(
            "failed",
            cancelled=self._stop.requested.is_set(),
            error=reason_of(error),
            kind=type(error).__name__,
            guest=self._whereabouts(session, error),
        )
        return False

    def _whereabouts(self, session: SourceSession, error: Exception) -> str:
        """Where the guest is, as far as this side can know once RUN is out and the migration has failed.

        With postcopy it has all of its memory when COMPLETE comes, without it when it runs. What is owed still never
        arrives, and a destination that ends before COMPLETE has not got everything. But all may have been sent, and the
        word of it have been lost.
        """
        postcopy = self._options.postcopy
        if self._complete or (session.running_at and not postcopy):
            return "destination"
        if session.tracker.dirty_count or (postcopy and isinstance(error, RemoteError)):
            return "gone"
        return "unknown"


def _taking(hints: HintSession) -> Callable[[int, Any], object]:
    """What the guest calls with its hints."""
    return lambda epoch, runs: hints.clear_runs(runs, epoch)


@contextlib.contextmanager
def _kept(problems: list[Exception]) -> Iterator[None]:
    """What goes wrong inside is kept, and ends nothing else."""
    try:
        yield
    except Exception as problem:
        _log_surprise(problem)
        problems.append(problem)


def _log_surprise(error: Exception) -> None:
    # What no peer and no kernel does is a fault of this program: say where.
    if not isinstance(error, PagecoreError | OSError | Cancelled):
        log.error("unexpected: %r", error, exc_info=error)
