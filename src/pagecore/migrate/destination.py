"""The destination's half of a migration: it lets the guest in, runs it, and proves that all of it arrived."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from typing import Any, Final, Literal

from pagecore import Command, Feature, HintSession, PageState, UnsupportedError, Userfaultfd
from pagecore.errors import PagecoreError, ProtocolError
from pagecore.hints import ResumedHintSession
from pagecore.migrate.link import Link
from pagecore.migrate.lists import apply_lists, discard_and_register, read_lists
from pagecore.migrate.options import PAGE_SIZE, Options
from pagecore.migrate.postcopy import Postcopy, stats_json
from pagecore.migrate.progress import Cancelled, Reporter, Stop
from pagecore.migrate.receiver import PrecopyReceiver
from pagecore.migrate.rendezvous import Listener
from pagecore.migrate.travel import encode_map, page_classes
from pagecore.testing import Guest, open_guest, verify_memory
from pagecore.wire import (
    Capabilities,
    FrameType,
    Hello,
    decode_report,
    encode_audit,
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
    address, session_id : str
        Where to listen, and the name of the session that is awaited.
    reporter : Reporter
    stop : Stop
    """

    def __init__(self, options: Options, address: str, session_id: str, reporter: Reporter, stop: Stop) -> None:
        self._options = options
        self._address = address
        self._session_id = session_id
        self._reporter = reporter
        self._stop = stop
        self._uffd: Userfaultfd | None = None
        self._state: PageState | None = None
        self._receiver: PrecopyReceiver | None = None
        self._postcopy: Postcopy | None = None
        self._done: threading.Thread | None = None
        self._done_error: Exception | None = None
        self._ran = False
        self._settled = False

    def run(self) -> bool:
        """Take part in the migration; True where the guest's memory was verified."""
        with contextlib.ExitStack() as stack:
            if self._options.postcopy:
                # Before anything else: without it there is no postcopy, and the source hears that in time.
                self._uffd = stack.enter_context(Userfaultfd(Feature.EVENT_REMOVE))
            link: Link | None = None
            try:
                link = stack.enter_context(self._accept(stack))
                stack.enter_context(self._reporter.sampling(self._counters))
                self._receive(link, stack)
                try:
                    self._start_guest(link)
                    self._arrive(link)
                except Exception as error:
                    self._fail_closed(link, error)
                    raise
                # D16: all is settled. Say so, and with what content it was placed.
                self._settled = True
                link.send(FrameType.COMPLETE, encode_report({}))
                link.send(FrameType.AUDIT, self._audit(link))
                return self._verify()
            # Whatever it was, even a fault of this program: the source and the person at the other end are told.
            except Exception as error:
                if not isinstance(error, PagecoreError | OSError | Cancelled):
                    log.error("unexpected: %r", error, exc_info=error)
                return self._fail(link, error)

    # ------------------------------------------------------------------------------------------------- HELLO

    def _accept(self, stack: contextlib.ExitStack) -> Link:
        guests: list[Guest] = []

        def answer(theirs: Hello) -> Hello:
            if not guests:
                guests.append(stack.enter_context(contextlib.closing(self._open_guest(theirs))))
                self._guest = guests[0]
            return dataclasses.replace(
                theirs,
                regions={0: self._guest.npages},
                page_size=PAGE_SIZE,
                capabilities=Capabilities(duplicates=self._options.duplicates),
            )

        with Listener(self._address) as listener:
            self._reporter.event("listening", address=listener.address)
            return listener.accept(
                self._session_id,
                answer,
                timeout=self._stop.remaining(),
                patience=self._options.stall_timeout,
                check=self._stop.check,
            )

    def _open_guest(self, theirs: Hello) -> Guest:
        kinds: dict[object, Literal["kvm", "process"]] = {"kvm": "kvm", "process": "process"}
        kind = kinds.get(theirs.details.get("guest"))
        if kind is None:
            raise ProtocolError("guest", f"{theirs.details.get('guest')!r} is neither kvm nor process")
        for name in ("postcopy", "emulate_qemu"):
            if theirs.details.get(name) is not getattr(self._options, name):
                raise ProtocolError(name, f"the peer says {theirs.details.get(name)}, this side the contrary")
        if kind == "kvm" and self._uffd is not None and self._uffd.user_mode_only:
            raise UnsupportedError(
                "userfaultfd for the faults of a KVM guest, which are the kernel's own",
                "run as root, give access to /dev/userfaultfd, or use --guest process",
            )
        options = self._options
        return open_guest(
            options.size,
            kind=kind,
            role="destination",
            seed=options.seed,
            vcpus=options.vcpus,
            free_share=options.free_share,
            dirty_rate=options.dirty_rate,
        )

    # ------------------------------------------------------------------------------------- precopy and switch

    def _receive(self, link: Link, stack: contextlib.ExitStack) -> None:
        """Precopy, and the switch up to the acknowledgement that lets RUN come."""
        guest = self._guest
        self._reporter.event("phase", phase="precopy")
        state = self._state = PageState(guest.npages)
        receiver = self._receiver = PrecopyReceiver(link, guest.memory, state, self._options.stall_timeout)
        header, payload = receiver.run(self._stop)
        self._reporter.event("phase", phase="switch", pages=receiver.pages, zeros=receiver.zeros)
        if header.type is not FrameType.STATE:
            raise ProtocolError("type", f"{header.type.name} came where STATE was due")
        # Before the acknowledgement: a state that does not fit leaves the guest where it is. Touches no memory.
        guest.load_state(payload)
        lists = read_lists(link, guest.npages)
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
                name=self._session_id[:8],
                patience=self._options.stall_timeout,
                look=self._look,
            )
            # Faults are served before the guest can make any.
            stack.enter_context(self._postcopy)
        link.send(FrameType.LISTS_ACK, first=lists.discard.list_id)

    def _start_guest(self, link: Link) -> None:
        _, payload = link.expect(FrameType.RUN)
        handed_over = decode_report(payload)
        self._ran = True
        # From here on a cancel only brings the deadline nearer: the guest is here.
        link.watch(self._stop.check_deadline)
        first_instruction = self._guest.run()
        link.send(FrameType.RUNNING, encode_report({"first_instruction": first_instruction}))
        self._reporter.event("phase", phase="postcopy" if self._options.postcopy else "finish")
        if handed_over:
            try:
                session = HintSession.resume(handed_over, self._announce)
            except ValueError as error:
                raise ProtocolError("hint session", str(error)) from None
            # S5: the one DONE, given where the guest runs now. The write may itself wait for a page, so it has a
            # thread to wait on: this one must notice if that page never comes.
            self._done = threading.Thread(target=self._finish_hints, args=(session,), name="hints-done", daemon=True)
            self._done.start()

    def _finish_hints(self, session: ResumedHintSession) -> None:
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
        self._stop.check_deadline()
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

    # ------------------------------------------------------------------------------------------------ the end

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

    def _audit(self, link: Link) -> bytes:
        if self._postcopy is not None:
            return self._postcopy.audit()
        return encode_audit([], [], self._guest.npages, generation=link.session.generation)

    def _verify(self) -> bool:
        """Let the guest run on for a while, stop it, and compare all of its memory (design section 6)."""
        guest = self._guest
        self._reporter.event("phase", phase="verify")
        steps = self._options.settle_steps or STEPS_PER_PAGE * guest.npages // self._options.vcpus
        guest.stop_after(steps)
        deadline = time.monotonic() + min(VERIFY_TIMEOUT, self._stop.remaining())
        while not guest.wait_stopped(0.1):
            if time.monotonic() >= deadline:
                raise TimeoutError("the guest did not stop itself in time for the verification")
        found = verify_memory(guest)
        self._report_map()
        self._reporter.event(
            "result",
            right=found.right,
            wrong=found.wrong,
            free=found.free,
            exact=found.exact,
            verification=str(found),
            user_mode_only=self._uffd is not None and self._uffd.user_mode_only,
            placement=None if self._postcopy is None else stats_json(self._postcopy.loop.stats()),
        )
        return found.exact

    def _report_map(self) -> None:
        """How each page travelled, as far as it is known."""
        if self._state is not None:
            postcopy = self._postcopy
            classes = page_classes(self._state) if postcopy is None else postcopy.travelled()
            self._reporter.event("map", **encode_map(classes))

    # ----------------------------------------------------------------------------------------------- failures

    def _fail_closed(self, link: Link, error: Exception) -> None:
        """If the guest ran and pages are missing for ever, it is lost, and must not read zeros."""
        postcopy = self._postcopy
        if postcopy is None or not self._ran:
            return
        # Said first: the thread of a guest that waits for such a page ends this process.
        self._reporter.event(
            "lost", error=str(error), kind=type(error).__name__, pages=postcopy.missing(), guest="gone"
        )
        link.fail(FrameType.ERROR, f"the destination failed: {error}")
        self._report_map()
        postcopy.fail_closed()

    def _fail(self, link: Link | None, error: Exception) -> bool:
        if link is not None:
            if not isinstance(error, Cancelled):
                error = link.explain(error)
            link.fail(FrameType.ERROR, f"the destination failed: {error or 'cancelled'}")
        self._report_map()
        where = "source"
        if self._ran:
            where = "destination" if self._settled or self._postcopy is None else "gone"
        self._reporter.event(
            "failed",
            cancelled=isinstance(error, Cancelled),
            error=str(error),
            kind=type(error).__name__,
            guest=where,
            unsupported=isinstance(error, UnsupportedError),
        )
        return False
