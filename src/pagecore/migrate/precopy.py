"""Precopy at the source: rounds of sending while the guest writes, each ended by a barrier (S4, W5)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from pagecore import Advice, Convergence, ConvergenceMeter, HintSession
from pagecore.errors import ProtocolError
from pagecore.migrate.link import Link
from pagecore.migrate.progress import round_json
from pagecore.migrate.sender import Outgoing, go_on
from pagecore.migrate.session import SourceSession
from pagecore.wire import FrameType

__all__ = ["barrier", "precopy", "send_round"]

# A guest that is slowed down at all is slowed down by steps of at least this; it is never stopped.
MORE_THROTTLE: Final = 0.1
MOST_THROTTLE: Final = 0.99
# The first round waits so long for the guest's report: what is hinted before it is sent is not sent at all.
HINT_HEAD_START: Final = 0.25
# Without a round there is no other time for it.
HINT_ONLY_CHANCE: Final = 2.0


def precopy(session: SourceSession, link: Link, outgoing: Outgoing, hints: HintSession | None) -> None:
    """Rounds, until what is left fits in the downtime, more of them lead nowhere, or there were enough."""
    options, tracker = session.options, session.tracker
    session.started_at = time.monotonic()
    meter = ConvergenceMeter(options.downtime_limit, postcopy=options.postcopy)
    share = 0.0
    tracker.sync()
    if not options.max_rounds:
        # Postcopy alone: what is free now is neither sent nor asked for.
        _open_epoch(session, hints)
        _close_epoch(hints)
        _pause(session, link, share)
    while session.rounds < options.max_rounds:
        session.rounds += 1
        session.phase("precopy")
        while True:
            _open_epoch(session, hints)
            began, before = time.monotonic(), outgoing.wire_bytes
            send_round(session, link, outgoing, lambda: session.pause.wanted(link))
            _close_epoch(hints)
            barrier(link, outgoing)
            paused = _pause(session, link, share)
            tracker.sync()
            if not paused:
                break
            # The round begins again, with what was written meanwhile: no figure has the pause in it.
        figures = meter.end_round(
            seconds=max(1e-6, time.monotonic() - began),
            sent=outgoing.wire_bytes - before,
            newly_dirty=tracker.newly_dirty_bytes,
            remaining=tracker.counts().dirty_bytes,
        )
        session.reporter.event("round", **round_json(figures))
        if figures.advice in (Advice.FINISH, Advice.POSTCOPY):
            return
        if figures.advice is Advice.THROTTLE and options.throttle:
            share = _harder(share, figures)
            session.guest.throttle(share)
            session.reporter.event("throttle", share=share)


def _harder(share: float, figures: Convergence) -> float:
    """How much of its time the guest is to rest now: enough to write half of what the link carries.

    What it writes twice in a round is counted once, so that it takes more than that would say.
    """
    enough = 1 - (1 - share) * figures.bandwidth / max(1.0, 2 * figures.dirty_rate)
    return min(MOST_THROTTLE, max(share + MORE_THROTTLE, enough))


def _open_epoch(session: SourceSession, hints: HintSession | None) -> None:
    if hints is None:
        return
    # S4: the sync before this re-armed and published all; only now may the guest hear of the epoch.
    epoch = hints.start()
    if session.rounds <= 1:
        session.guest.wait_hints_reported(epoch, HINT_HEAD_START if session.rounds else HINT_ONLY_CHANCE)


def _close_epoch(hints: HintSession | None) -> None:
    if hints is not None:
        # S4: a hint given before the next sync is not good after it.
        hints.stop()


def _pause(session: SourceSession, link: Link, share: float) -> bool:
    """Stand still where that is wanted, and say whether it was; a guest that is slowed down is let go meanwhile."""
    if share and session.pause.wanted(link):
        session.guest.throttle(0)
    # Whatever is owed at this moment: the switch is held back, too.
    paused = session.pause.hold(link, lambda wait: _look(session, link, wait), lambda: True)
    if share and paused:
        session.guest.throttle(share)
    return paused


def _look(session: SourceSession, link: Link, wait: float = 0.0) -> None:
    session.stop.check()
    # The peer may have said why it takes nothing any more.
    if link.control.readable(wait):
        header, _ = link.receive()
        raise ProtocolError("type", f"{header.type.name} in the middle of a round")


def send_round(session: SourceSession, link: Link, outgoing: Outgoing, held: Callable[[], bool] = go_on) -> None:
    """Send what is owed now, unless it is held back; what a VMM write adds meanwhile waits for the next round.

    The senders are quiet when it returns.
    """
    session.stop.check()
    outgoing.send_owed(session.tracker.dirty_count, lambda: _look(session, link), held)


def barrier(link: Link, outgoing: Outgoing) -> None:
    """W5: everything of this round has arrived on every stream before anything of the next one leaves."""
    outgoing.mark(FrameType.ROUND)
    header, _ = link.expect(FrameType.ROUND_ACK)
    if header.round != link.round:
        raise ProtocolError("round", f"{header.round} is acknowledged, {link.round} was sent")
    link.round += 1
