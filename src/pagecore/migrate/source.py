"""The source's half of a migration: precopy, the switch, postcopy, and the way back before it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from typing import Any, Final

import numpy as np

from pagecore import Advice, Bitmap, Command, ConvergenceMeter, HintSession, PageTracker
from pagecore.errors import PagecoreError, PeerGoneError, ProtocolError
from pagecore.migrate.answers import Answers
from pagecore.migrate.link import Link
from pagecore.migrate.options import PAGE_SIZE, Options
from pagecore.migrate.progress import Cancelled, Reporter, Stop, round_json
from pagecore.migrate.rendezvous import connect
from pagecore.migrate.sender import BulkSender, FrameWriter, Pacer
from pagecore.testing import Guest, open_guest, page_checksums
from pagecore.wire import (
    Capabilities,
    FrameType,
    Hello,
    decode_audit,
    decode_report,
    encode_page_set,
    encode_report,
)

__all__ = ["Source"]

log = logging.getLogger("pagecore.migrate")

# The first round waits so long for the guest's report: what is hinted before it is sent is not sent at all.
HINT_HEAD_START: Final = 0.25
# A guest that cannot be stopped in this time is not migrated.
PAUSE_TIMEOUT: Final = 5.0
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
    """

    def __init__(self, options: Options, address: str, session_id: str, reporter: Reporter, stop: Stop) -> None:
        self._options = options
        self._address = address
        self._session_id = session_id
        self._reporter = reporter
        self._stop = stop
        # Once RUN was handed to the link the guest may run over there, and never again here (S9).
        self._handed = False
        self._complete = False
        self._rounds = 0
        self._paused_at = 0.0
        self._running_at = 0.0
        self._started_at = 0.0

    def run(self) -> bool:
        """Migrate; True where it was completed and nothing was found wrong."""
        options = self._options
        with contextlib.ExitStack() as stack:
            self._guest = stack.enter_context(
                contextlib.closing(
                    open_guest(
                        options.size,
                        kind=options.guest,
                        role="source",
                        seed=options.seed,
                        vcpus=options.vcpus,
                        free_share=options.free_share,
                        dirty_rate=options.dirty_rate,
                    )
                )
            )
            guest = self._guest
            self._reporter.event("guest", kind=guest.kind, reason=guest.reason, npages=guest.npages)
            self._phase("boot")
            guest.boot()
            self._tracker = PageTracker(guest.npages, dirty_log=guest.dirty_log)
            # S12: no log sees what the machine itself writes.
            guest.on_vmm_write = self._tracker.mark
            guest.run()
            try:
                self._stop.check()
                self._phase("connect")
                self._link = stack.enter_context(self._connect())
            except Exception as error:
                _log_surprise(error)
                return self._keep_guest(error, None)
            memory = stack.enter_context(memoryview(guest.memory).toreadonly())
            self._bulk = FrameWriter(self._link, self._link.bulk, memory)
            self._urgent = FrameWriter(self._link, self._link.urgent, memory)
            self._sender = BulkSender(self._bulk, self._tracker, Pacer(options.bandwidth))
            stack.enter_context(self._reporter.sampling(self._counters))
            return self._migrate()

    def _connect(self) -> Link:
        options, guest = self._options, self._guest
        hello = Hello(
            stream="control",
            session_id=self._session_id,
            generation=0,
            page_size=PAGE_SIZE,
            regions={0: guest.npages},
            capabilities=Capabilities(duplicates=options.duplicates),
            details={
                "guest": guest.kind,
                "postcopy": options.postcopy,
                "emulate_qemu": options.emulate_qemu,
            },
        )
        link = connect(self._address, hello, timeout=self._stop.remaining(), patience=self._options.stall_timeout)
        link.watch(self._stop.check)
        link.bulk.check = lambda: self._check_quiet(link)
        return link

    def _check_quiet(self, link: Link) -> None:
        """While the bulk stream takes nothing: the peer may have said why on the control stream."""
        self._stop.check()
        if link.control.readable(0):
            header, _ = link.receive()
            raise ProtocolError("type", f"{header.type.name} in the middle of a round")

    def _migrate(self) -> bool:
        guest, options = self._guest, self._options
        session: HintSession | None = None
        if options.hints:
            # S12: the guest's machine marks what it writes (on_vmm_write), so that hints are safe beside it.
            session = self._tracker.hint_session(
                promise="armed", marked=guest.dirty_log.misses, on_command=self._announce
            )
            guest.on_hints = lambda epoch, runs: session.clear_runs(runs, epoch)
        answers = Answers(self._link, self._tracker, self._urgent, emulate_qemu=self._options.emulate_qemu)
        try:
            self._precopy(session)
            self._switch(session, answers)
            # From here on a cancel only brings the deadline nearer.
            self._push(answers)
            self._finish(answers)
            return self._result(session, answers)
        # Whatever it was, even a fault of this program: the guest is on one side, and this decides on which.
        except Exception as error:
            _log_surprise(error)
            if not self._handed:
                return self._keep_guest(error, session)
            return self._lose_guest(error)
        finally:
            answers.close()

    def _announce(self, command: Command, epoch: int) -> None:
        self._guest.announce(command, epoch)
        self._reporter.event("hints", command=command.name, epoch=epoch)

    # ----------------------------------------------------------------------------------------------- precopy

    def _precopy(self, session: HintSession | None) -> None:
        """Rounds, until what is left fits in the downtime, or there were enough of them."""
        self._started_at = time.monotonic()
        meter = ConvergenceMeter(self._options.downtime_limit, postcopy=self._options.postcopy)
        self._tracker.sync()
        while True:
            self._rounds += 1
            self._phase("precopy")
            self._open_epoch(session)
            began, before = time.monotonic(), self._sender.counters.wire_bytes
            self._send_round()
            if session is not None:
                # S4: a hint given before this sync is not good after it.
                session.stop()
            self._barrier()
            self._tracker.sync()
            figures = meter.end_round(
                seconds=max(1e-6, time.monotonic() - began),
                sent=self._sender.counters.wire_bytes - before,
                newly_dirty=self._tracker.newly_dirty_bytes,
                remaining=self._tracker.counts().dirty_bytes,
            )
            self._reporter.event("round", **round_json(figures))
            if self._rounds >= self._options.max_rounds:
                return
            if not self._options.postcopy and figures.advice is Advice.FINISH:
                return

    def _open_epoch(self, session: HintSession | None) -> None:
        if session is None:
            return
        # S4: the sync before this re-armed and published all; only now may the guest hear of the epoch.
        epoch = session.start()
        if self._rounds == 1:
            self._guest.wait_hints_reported(epoch, HINT_HEAD_START)

    def _send_round(self) -> None:
        """Send what is owed now; what a VMM write adds meanwhile waits for the next round."""
        left = self._tracker.dirty_count
        while left > 0:
            self._stop.check()
            sent = self._sender.send_some(left)
            if not sent:
                # Hints took the rest.
                break
            left -= sent

    def _barrier(self) -> None:
        """W5: everything of this round has arrived before anything of the next one leaves."""
        self._bulk.mark(FrameType.ROUND)
        header, _ = self._link.expect(FrameType.ROUND_ACK)
        if header.round != self._link.round:
            raise ProtocolError("round", f"{header.round} is acknowledged, {self._link.round} was sent")
        self._link.round += 1

    # ------------------------------------------------------------------------------------------------ switch

    def _switch(self, session: HintSession | None, answers: Answers) -> None:
        """S8: guest stopped, senders quiet, last sync, barrier, state, lists, acknowledgement, RUN."""
        self._phase("switch")
        self._paused_at = self._guest.pause(PAUSE_TIMEOUT)
        handed_over: dict[str, Any] = {}
        if session is not None:
            # S5: from here on DONE is due at the destination. Its last STOP is written before the last sync.
            handed_over = session.hand_over()
        # S12: the last sync publishes the side plane too. This thread is the only sender: it is quiet.
        self._tracker.sync(last=True)
        if not self._options.postcopy:
            self._send_round()
        self._barrier()
        self._link.send(FrameType.STATE, self._guest.save_state())
        self._send_lists()
        self._stop.check()
        # The destination may fault on its first instruction: whoever answers is there before.
        if self._options.postcopy:
            answers.start()
        self._handed = True
        self._link.watch(self._stop.check_deadline)
        self._link.bulk.check = lambda: self._check(answers)
        self._link.send(FrameType.RUN, encode_report(handed_over))
        self._phase("postcopy" if self._options.postcopy else "finish")

    def _send_lists(self) -> None:
        npages, generation = self._guest.npages, self._link.session.generation
        # As bitmaps: the guest is stopped, and what comes as runs may be millions of them (S8).
        discard, hinted = self._tracker.discard_pages(), self._tracker.hinted_pages()
        self._free = self._tracker.hinted
        if self._options.emulate_qemu:
            # What QEMU's source knows: a hinted page is as clean as one that was sent.
            discard, hinted = self._tracker.dirty, Bitmap(npages)
        elif not self._link.capabilities.hinted_runs:
            # The destination asks for them instead, and is told FILL: it must drop what it has all the same.
            hinted = Bitmap(npages)
        list_id = 1
        for kind, pages in ((FrameType.DISCARD, discard), (FrameType.HINTED, hinted)):
            self._link.send(kind, encode_page_set(pages, generation=generation, list_id=list_id))
        # S8: RUN follows only the acknowledgement of both lists, which here says that the state was loaded, too.
        header, _ = self._link.expect(FrameType.LISTS_ACK)
        if header.first != list_id:
            raise ProtocolError("first", f"list {header.first} is acknowledged, {list_id} was sent")

    # ---------------------------------------------------------------------------------------------- postcopy

    def _push(self, answers: Answers) -> None:
        """Send all that is owed on the bulk stream, while requests are answered beside it."""
        while self._tracker.dirty_count:
            self._check(answers)
            self._sender.send_some()

    def _finish(self, answers: Answers) -> None:
        """D16: nothing is dirty; name what is still hinted, and answer until COMPLETE."""
        generation = self._link.session.generation
        hinted = Bitmap(self._guest.npages) if self._options.emulate_qemu else self._tracker.hinted_pages()
        if self._options.postcopy:
            self._bulk.mark(FrameType.END)
        self._link.send(FrameType.FINISH, encode_page_set(hinted, generation=generation))
        asked, quiet_since = -1, 0.0
        while not self._complete:
            self._check(answers, wait=0.05)
            if answers.counters.requested != asked:
                asked, quiet_since = answers.counters.requested, time.monotonic()
            if time.monotonic() > quiet_since + self._options.stall_timeout:
                raise PeerGoneError(f"the destination was silent for {self._options.stall_timeout:g} s")
        self._finished_at = time.monotonic()

    def _check(self, answers: Answers, wait: float = 0.0) -> None:
        """Look at everything that may have happened beside the bulk stream."""
        self._stop.check_deadline()
        # Asked first: a peer that is done says COMPLETE before it closes the urgent stream.
        error = answers.error
        if self._link.control.readable(wait):
            header, payload = self._link.receive()
            if header.type is FrameType.RUNNING and not self._running_at:
                first_instruction = decode_report(payload).get("first_instruction")
                if not isinstance(first_instruction, float) or first_instruction <= 0:
                    raise ProtocolError("first_instruction", f"{first_instruction!r} is no time")
                self._running_at = first_instruction
                downtime = self._running_at - self._paused_at
                self._reporter.event("running", downtime=downtime, first_instruction=self._running_at)
            elif header.type is FrameType.COMPLETE and self._running_at:
                self._complete = True
            else:
                raise ProtocolError("type", f"{header.type.name} has no place here")
        elif error is not None:
            raise error

    def _audit(self) -> tuple[int, int]:
        """Compare what the destination placed with the frozen memory: (pages, wrong)."""
        _, payload = self._link.expect(FrameType.AUDIT)
        runs, sums = decode_audit(payload, self._guest.npages, generation=self._link.session.generation)
        placed = Bitmap(self._guest.npages)
        placed.set_runs(runs)
        # What the guest held free at the switch has no content that could be compared.
        compared = ~self._free.test_indices(placed.indices())
        different = sums != page_checksums(self._guest.memory, runs)
        return int(np.count_nonzero(compared)), int(np.count_nonzero(different & compared))

    # ----------------------------------------------------------------------------------------------- results

    def _result(self, session: HintSession | None, answers: Answers) -> bool:
        pages, wrong = self._audit()
        stats = self._guest.stats()
        self._reporter.event(
            "result",
            **self._counters(),
            answers=dataclasses.asdict(answers.counters),
            stale_hints=session.stale if session is not None else 0,
            downtime=self._running_at - self._paused_at,
            total_time=self._finished_at - self._started_at,
            audit_pages=pages,
            audit_wrong=wrong,
            self_checks=stats.self_checks,
            self_check_errors=stats.self_check_errors,
        )
        return wrong == 0 and stats.self_check_errors == 0

    def _counters(self) -> dict[str, Any]:
        bulk, urgent = self._bulk.counters, self._urgent.counters
        return {
            "rounds": self._rounds,
            "pages_sent": bulk.pages + urgent.pages,
            "pages_urgent": urgent.pages,
            "pages_zero": bulk.zeros + urgent.zeros,
            "wire_bytes": bulk.wire_bytes + urgent.wire_bytes,
            "owed": self._tracker.dirty_count,
            "hinted": self._tracker.hinted_count,
            "pages_written": self._guest.stats().pages_written,
        }

    def _phase(self, name: str) -> None:
        self._reporter.event("phase", phase=name, round=self._rounds)

    def _keep_guest(self, error: Exception, session: HintSession | None) -> bool:
        """The switch did not come: the guest goes on here, and proves that it does."""
        link: Link | None = getattr(self, "_link", None)
        if link is not None and not isinstance(error, Cancelled):
            error = link.explain(error)
        guest: Guest = self._guest
        guest.on_hints = None
        problem: Exception | None = None
        try:
            guest.resume()
            if session is not None:
                # S5: exactly one DONE, on this side now, where the guest runs.
                if session.state.name == "HANDED_OVER":
                    session.take_back()
                session.finish()
            if link is not None:
                reason = "cancelled" if isinstance(error, Cancelled) else str(error)
                link.fail(FrameType.ABORT, f"the source ended the migration: {reason}")
                link.close()
            self._self_check()
        except Exception as second:
            _log_surprise(second)
            problem = second
        self._reporter.event(
            "failed",
            cancelled=isinstance(error, Cancelled),
            error="" if isinstance(error, Cancelled) else str(error),
            kind=type(error).__name__,
            guest="source",
            self_check=problem is None,
            problem=str(problem or ""),
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

    def _lose_guest(self, error: Exception) -> bool:
        """RUN is out: whatever happened, the guest does not run here again (S9)."""
        error = self._link.explain(error)
        self._link.fail(FrameType.ERROR, f"the source failed: {error}")
        # Without postcopy nothing is missing over there: losing the source does no harm.
        self._reporter.event(
            "failed",
            cancelled=self._stop.requested.is_set(),
            error=str(error),
            kind=type(error).__name__,
            guest="destination" if self._complete or not self._options.postcopy else "gone",
        )
        return False


def _log_surprise(error: Exception) -> None:
    # What no peer and no kernel does is a fault of this program: say where.
    if not isinstance(error, PagecoreError | OSError | Cancelled):
        log.error("unexpected: %r", error, exc_info=error)
