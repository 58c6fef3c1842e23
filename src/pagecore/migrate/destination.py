"""The destination's half of a migration: it lets the guest in, runs it, and proves that all of it arrived."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from typing import Any, Final

from pagecore import Command, Feature, HintSession, PageState, UnsupportedError, Userfaultfd
from pagecore.errors import PagecoreError, PeerGoneError, ProtocolError
from pagecore.hints import ResumedHintSession
from pagecore.migrate.agreement import boot_id, learn
from pagecore.migrate.link import TICK, Link, RemoteError
from pagecore.migrate.listener import Listener
from pagecore.migrate.lists import apply_lists, discard_and_register, read_lists
from pagecore.migrate.options import PAGE_SIZE, Options
from pagecore.migrate.pause import SignsOfLife
from pagecore.migrate.postcopy import Postcopy
from pagecore.migrate.progress import Cancelled, Reporter, Stop, reason_of
from pagecore.migrate.receiver import PrecopyReceiver
from pagecore.migrate.recovery import FAREWELL_SECONDS, LOST, BadFrames, Reception, hears_until, may_return
from pagecore.migrate.transport import Transport
from pagecore.migrate.travel import encode_map, page_classes
from pagecore.migrate.verdict import OF_DESTINATION, OF_SOURCE, hear, tell
from pagecore.testing import Guest, PlacementAudit, open_guest, verify_memory
from pagecore.wire import (
    Capabilities,
    FrameType,
    Hello,
    decode_report,
    encode_audit,
    encode_page_set,
    encode_report,
)

__all__ = ["Destination"]

log = logging.getLogger("pagecore.migrate")

# The guest makes so many steps a page before it stops for the verification: it comes by most of its pages.
STEPS_PER_PAGE: Final = 1
VERIFY_TIMEOUT: Final = 30.0


class Destination:
    """One migration, seen from where the guest runs in the end.

    Parameters
    ----------
    options : Options
        What the guest is comes from the source.
    address : str
        Where to listen.
    session_id : str or None
        The name of the session that is awaited; None takes the first that comes.
    reporter : Reporter
    stop : Stop
    transport : Transport, optional
    max_size : int, optional
        Bytes of memory that a guest may have.
    """

    def __init__(
        self,
        options: Options,
        address: str,
        session_id: str | None,
        reporter: Reporter,
        stop: Stop,
        *,
        transport: Transport | None = None,
        max_size: int | None = None,
    ) -> None:
        self._options = options
        self._address = address
        self._session_id = session_id
        self._reporter = reporter
        self._stop = stop
        self._transport = transport or Transport()
        self._max_size = max_size
        self._uffd: Userfaultfd | None = None
        self._state: PageState | None = None
        self._receiver: PrecopyReceiver | None = None
        self._postcopy: Postcopy | None = None
        self._done: threading.Thread | None = None
        self._done_error: Exception | None = None
        self._link: Link | None = None
        self._reception: Reception | None = None
        self._bad_frames = BadFrames()
        self._signs = SignsOfLife(stop, reporter)
        self._ran = False
        self._running = threading.Event()
        self._first_instruction = 0.0
        self._settled = False

    def run(self) -> bool:
        """Take part in the migration; True where the guest's memory was verified."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._hang_up)
            try:
                listener = stack.enter_context(Listener(self._address, self._transport, self._refused))
                self._reporter.event("listening", address=listener.address)
                link = self._accept(listener, stack)
                stack.enter_context(self._reporter.sampling(self._counters))
                self._receive(link, stack)
                if link.capabilities.recovery:
                    self._reception = stack.enter_context(
                        Reception(listener, self._answer, link, self._options.stall_timeout)
                    )
                try:
                    # S8: RUN may follow now.
                    self._settle(link)
                except Exception as error:
                    self._fail_closed(error)
                    raise
                # D16: all is settled. Say so, and with what content it was placed.
                self._settled = True
                told = self._complete()
                good = self._verify()
                self._part(told)
                return good
            # Whatever it was, even a fault of this program: the source and the person at the other end are told.
            except Exception as error:
                if not isinstance(error, PagecoreError | OSError | Cancelled):
                    log.error("unexpected: %r", error, exc_info=error)
                self._fail(error)
                if self._ran and self._postcopy is not None and self._postcopy.missing():
                    # D12: the guest sleeps until this process has ended. Nothing is closed under it, or waits for it.
                    self._hang_up()
                    stack.pop_all()
                return False

    def _hang_up(self) -> None:
        if self._link is not None:
            self._link.close()

    # ------------------------------------------------------------------------------------------------- HELLO

    def _accept(self, listener: Listener, stack: contextlib.ExitStack) -> Link:
        host = stack.enter_context(contextlib.ExitStack())
        own, guest_of = self._options, ""

        def answer(theirs: Hello) -> Hello:
            nonlocal guest_of
            if theirs.session_id != guest_of:
                # What was opened for a session that came to nothing goes first.
                host.close()
                self._options = learn(own, theirs, self._max_size)
                self._guest = self._open_guest(host)
                guest_of = theirs.session_id
            return self._answer(theirs)

        link = self._link = listener.accept(
            self._session_id,
            answer,
            timeout=self._stop.remaining(),
            patience=self._options.stall_timeout,
            check=self._stop.check,
        )
        self._stop.limit(self._options.timeout)
        self._reporter.event("session", options=self._options.to_json())
        return link

    def _answer(self, theirs: Hello) -> Hello:
        return dataclasses.replace(
            theirs,
            regions={0: self._guest.npages},
            page_size=PAGE_SIZE,
            capabilities=Capabilities(
                duplicates=self._options.duplicates, recovery=may_return(self._options), pause=True
            ),
            details={"boot": boot_id(), "hears_until": hears_until(self._options)},
        )

    def _refused(self, reason: str) -> None:
        self._reporter.event("refused", reason=reason)

    def _open_guest(self, stack: contextlib.ExitStack) -> Guest:
        options = self._options
        self._uffd = None
        if options.postcopy:
            # Before anything else: without it there is no postcopy, and the source hears that in time.
            self._uffd = stack.enter_context(Userfaultfd(Feature.EVENT_REMOVE))
        if options.guest == "kvm" and self._uffd is not None and self._uffd.user_mode_only:
            raise UnsupportedError(
                "userfaultfd for the faults of a KVM guest, which are the kernel's own",
                "run as root, give access to /dev/userfaultfd, or use --guest process",
            )
        guest = open_guest(
            options.size,
            kind=options.guest,
            role="destination",
            seed=options.seed,
            vcpus=options.vcpus,
            free_share=options.free_share,
            dirty_rate=options.dirty_rate,
        )
        return stack.enter_context(contextlib.closing(guest))

    # ------------------------------------------------------------------------------------- precopy and switch

    def _receive(self, link: Link, stack: contextlib.ExitStack) -> None:
        """Precopy, and the switch up to the acknowledgement that lets RUN come."""
        guest = self._guest
        self._reporter.event("phase", phase="precopy")
        state = self._state = PageState(guest.npages)
        receiver = self._receiver = PrecopyReceiver(
            link, guest.memory, state, self._options.stall_timeout, self._signs.hear
        )
        header, payload = receiver.run(self._stop)
        self._reporter.event("phase", phase="switch", pages=receiver.pages, zeros=receiver.zeros)
        if header.type is not FrameType.STATE:
            raise ProtocolError("type", f"{header.type.name} came where STATE was due")
        # Before the acknowledgement: a state that does not fit leaves the guest where it is. Touches no memory.
        guest.load_state(payload)
        lists = read_lists(link, guest.npages)
        self._list_id = lists.id
        if self._uffd is None:
            apply_lists(guest.memory, state, lists)
        else:
            region = discard_and_register(
                guest.memory, state, lists, self._uffd, emulate_qemu=self._options.emulate_qemu
            )
            self._postcopy = Postcopy(
                link,
                region,
                state,
                name=link.peer.session_id[:8],
                patience=self._options.stall_timeout,
                look=self._look,
                hear=self._signs.hear,
            )
            # Faults are served before the guest can make any.
            stack.enter_context(self._postcopy)

    # ------------------------------------------------------------------- from the lists to the last page

    def _settle(self, link: Link) -> None:
        """Until nothing is missing, over as many links as it takes."""
        acknowledged = False
        # RUN may be on its way as soon as the lists are acknowledged: from here on it takes two wishes for an end to
        # get one, and no time is too long.
        link.watch(self._stop.check_given_up)
        while True:
            try:
                if not acknowledged:
                    acknowledged = True
                    link.send(FrameType.LISTS_ACK, first=self._list_id)
                if not self._ran:
                    self._start_guest(link)
                self._arrive(link)
                return
            except LOST as error:
                link = self._await_return(error)

    def _start_guest(self, link: Link) -> None:
        _, payload = link.expect(FrameType.RUN)
        handed_over = decode_report(payload)
        hints: ResumedHintSession | None = None
        if handed_over:
            try:
                hints = HintSession.resume(handed_over, self._announce)
            except ValueError as error:
                raise ProtocolError("hint session", str(error)) from None
            # S5: the one DONE, given where the guest runs now. The write may itself wait for a page, so it has a
            # thread to wait on: this one must notice if that page never comes. Without one the guest stays there.
            self._done = threading.Thread(target=self._finish_hints, args=(hints,), name="hints-done", daemon=True)
            self._done.start()
        # S9: from here on this side never denies it again.
        self._ran = True
        self._first_instruction = self._guest.run()
        self._running.set()
        self._reporter.event("phase", phase="postcopy" if self._options.postcopy else "finish")
        link.send(FrameType.RUNNING, encode_report({"first_instruction": self._first_instruction}))

    def _finish_hints(self, session: ResumedHintSession) -> None:
        self._running.wait()
        try:
            session.finish()
        # On a thread of its own: `_look` raises it.
        except Exception as error:
            self._done_error = error

    def _announce(self, command: Command, epoch: int) -> None:
        self._guest.announce(command, epoch)
        self._reporter.event("hints", command=command.name, epoch=epoch)

    def _look(self) -> None:
        """Whatever may go wrong while pages arrive."""
        self._stop.check_given_up()
        for error in (self._guest.error, self._done_error):
            if error is not None:
                raise error

    def _counters(self) -> dict[str, Any]:
        """How far it is, for a progress report."""
        receiver, postcopy = self._receiver, self._postcopy
        return {
            "received": 0 if receiver is None else receiver.pages,
            "received_zeros": 0 if receiver is None else receiver.zeros,
            "pages_written": self._guest.stats().pages_written,
            **({} if postcopy is None else postcopy.counters()),
        }

    def _arrive(self, link: Link) -> None:
        """Until nothing is missing, and the guest was told that hinting is done."""
        if self._postcopy is None:
            link.expect(FrameType.FINISH)
        else:
            self._postcopy.run()
        self._reporter.event("phase", phase="settle")
        while self._done is not None and self._done.is_alive():
            self._done.join(0.1)
            self._look()
        self._look()
        if self._postcopy is not None:
            self._postcopy.end()

    # --------------------------------------------------------------------------------------- the link is lost

    def _await_return(self, error: Exception) -> Link:
        """Wait until the source is back, and tell it what has arrived; the guest goes on as far as it can.

        Raises
        ------
        PagecoreError
            The error that lost the link, where it is no loss of the link; or that the source did not come back.
        """
        link, reception = self._link, self._reception
        assert link is not None
        error = link.explain(error)
        if isinstance(error, RemoteError) or reception is None or self._bad_frames.final(error):
            raise error
        link.hang_up()
        began, patience = time.monotonic(), self._options.reconnect_timeout
        self._reporter.event("link_lost", error=str(error), generation=link.session.generation)
        while True:
            self._look()
            fresh = reception.wait(TICK)
            if fresh is not None:
                try:
                    self._resume(fresh)
                except LOST as again:
                    # The source may be content with it: it hears at once that there has to be another.
                    fresh.hang_up()
                    if self._bad_frames.final(again):
                        raise
                    self._reporter.event("link_lost", error=str(again), generation=fresh.session.generation)
                    continue
                self._reporter.event(
                    "reconnected",
                    generation=fresh.session.generation,
                    missing=self._postcopy.missing() if self._postcopy is not None and not self._settled else 0,
                    seconds=time.monotonic() - began,
                )
                return fresh
            if self._stop.alone.is_set():
                raise error
            if time.monotonic() >= began + patience:
                raise PeerGoneError(f"the link was lost ({error}), and the source did not come back in {patience:g} s")

    def _resume(self, link: Link) -> None:
        """S9: placers quiet, what is settled, the source's acknowledgement; then requests again."""
        assert self._link is not None
        assert self._state is not None
        self._link.close()
        self._link = link
        if not self._ran:
            # S9: nobody has run it here, and the source is there to hear it: whoever wants an end may have one.
            self._stop.check()
        link.watch(self._stop.check_given_up)
        postcopy = None if self._settled else self._postcopy
        if postcopy is not None:
            postcopy.quiesce()
        try:
            report = {"ran": self._ran, "first_instruction": self._first_instruction, "complete": self._settled}
            link.send(FrameType.RETURN, encode_report(report))
            if not self._settled:
                generation = link.session.generation
                settled = encode_page_set(self._state.settled(), generation=generation, list_id=self._list_id)
                link.send(FrameType.SETTLED, settled)
            link.expect(FrameType.RESUME)
            link.set_patience(self._options.stall_timeout)
        except BaseException:
            # Even where this link is lost already: hinted pages are filled and discards are read meanwhile.
            if postcopy is not None:
                with contextlib.suppress(PeerGoneError):
                    postcopy.resume(link)
            raise
        if postcopy is not None:
            postcopy.resume(link)

    # ------------------------------------------------------------------------------------------------ the end

    def _complete(self) -> bool:
        """Say that everything is here, and with what content it was placed; False where the link is lost."""
        assert self._link is not None
        try:
            self._link.send(FrameType.COMPLETE, encode_report({}))
            self._link.send(FrameType.AUDIT, self._audit(self._link))
        except LOST:
            return False
        return True

    def _part(self, told: bool) -> None:
        """Until both sides know what the other found, or the source does not come back: the guest lives here anyway."""
        link = self._link
        assert link is not None
        lost: Exception = PeerGoneError("the link was lost at the end")
        while True:
            try:
                if told:
                    tell(link, self._found, OF_DESTINATION)
                    self._reporter.event("peer", result=hear(link, OF_SOURCE))
                    return
            except LOST as error:
                lost = error
            except (PagecoreError, OSError, Cancelled) as error:
                self._reporter.event("peer", error=str(error))
                return
            try:
                link = self._await_return(lost)
            except (PagecoreError, OSError, Cancelled) as error:
                self._reporter.event("peer", error=str(error))
                return
            try:
                link.send(FrameType.AUDIT, self._audit(link))
                told = True
            except LOST as error:
                told, lost = False, error

    def _audit(self, link: Link) -> bytes:
        generation = link.session.generation
        if self._postcopy is not None:
            return self._postcopy.audit(generation)
        nothing = PlacementAudit(self._guest.npages)
        return encode_audit(nothing.content, nothing.zeros, nothing.sums(), generation=generation)

    def _verify(self) -> bool:
        """Let the guest run on for a while, stop it, and compare all of its memory (design section 6)."""
        guest = self._guest
        self._reporter.event("phase", phase="verify")
        steps = self._options.settle_steps or STEPS_PER_PAGE * guest.npages // self._options.vcpus
        guest.stop_after(steps)
        deadline = time.monotonic() + VERIFY_TIMEOUT
        while not guest.wait_stopped(0.5):
            self._sign_of_life()
            self._stop.check_given_up()
            if time.monotonic() >= deadline:
                raise TimeoutError("the guest did not stop itself in time for the verification")
        found = verify_memory(guest)
        self._report_map()
        self._found: dict[str, Any] = {
            "right": found.right,
            "wrong": found.wrong,
            "free": found.free,
            "exact": found.exact,
            "verification": str(found),
        }
        self._reporter.event(
            "result",
            **self._found,
            user_mode_only=self._uffd is not None and self._uffd.user_mode_only,
            placement=None if self._postcopy is None else self._postcopy.stats_json(),
        )
        return found.exact

    def _report_map(self) -> None:
        """How each page travelled, as far as it is known."""
        if self._state is not None:
            postcopy = self._postcopy
            classes = page_classes(self._state) if postcopy is None else postcopy.travelled()
            self._reporter.event("map", **encode_map(classes))

    def _sign_of_life(self) -> None:
        """The source waits for the verdict as long as this side is not silent."""
        assert self._link is not None
        with contextlib.suppress(*LOST):
            self._link.send(FrameType.COMPLETE, encode_report({}))

    # ----------------------------------------------------------------------------------------------- failures

    def _fail_closed(self, error: Exception) -> None:
        """If the guest ran and pages are missing for ever, it is lost, and must not read zeros."""
        postcopy, link = self._postcopy, self._link
        if postcopy is None or link is None or not self._ran:
            return
        # Said first: the thread of a guest that waits for such a page ends this process.
        self._reporter.event(
            "lost", error=reason_of(error), kind=type(error).__name__, pages=postcopy.missing(), guest="gone"
        )
        link.fail(FrameType.ERROR, f"the destination failed: {reason_of(error)}")
        self._report_map()
        postcopy.fail_closed()

    def _fail(self, error: Exception) -> None:
        link = self._link
        if link is not None:
            if not isinstance(error, Cancelled):
                error = link.explain(error)
            # S9: said by one who ends, and so never executes a RUN that is still on its way.
            reason = f"the destination failed: {reason_of(error) or 'cancelled'}"
            link.fail(FrameType.ERROR, reason, ran=self._ran)
            if not self._ran and self._reception is not None and not isinstance(error, RemoteError):
                self._be_heard(link, self._reception, reason)
        self._report_map()
        where = "source"
        if self._ran:
            where = "destination" if self._settled or self._postcopy is None else "gone"
        self._reporter.event(
            "failed",
            cancelled=isinstance(error, Cancelled),
            error=reason_of(error),
            kind=type(error).__name__,
            guest=where,
            unsupported=isinstance(error, UnsupportedError),
        )

    def _be_heard(self, link: Link, reception: Reception, reason: str) -> None:
        """S9: the guest is nowhere but at the source, which may be on its way back, and must not end without this."""
        deadline = time.monotonic() + FAREWELL_SECONDS
        # Whoever has heard it says so, and that is the last word on a link.
        while not isinstance(link.explain(PeerGoneError(reason)), RemoteError):
            if self._stop.alone.is_set() or time.monotonic() >= deadline:
                return
            fresh = reception.wait(TICK)
            if fresh is not None:
                self._hang_up()
                link = self._link = fresh
                link.fail(FrameType.ERROR, reason, ran=False)
