"""The switch at the source: guest stopped, last sync, barrier, state, lists, up to their acknowledgement (S8)."""

from __future__ import annotations

from typing import Any, Final

from pagecore import Bitmap, HintSession
from pagecore.errors import ProtocolError
from pagecore.migrate.link import Link
from pagecore.migrate.precopy import barrier, send_round
from pagecore.migrate.sender import Outgoing
from pagecore.migrate.session import SourceSession
from pagecore.wire import FrameType, encode_page_set

__all__ = ["LIST_ID", "switch"]

# A guest that cannot be stopped in this time is not migrated.
PAUSE_TIMEOUT: Final = 5.0
# There is one switch in a session, and so one pair of lists (S9).
LIST_ID: Final = 1


def switch(session: SourceSession, link: Link, outgoing: Outgoing, hints: HintSession | None) -> dict[str, Any]:
    """Everything before RUN.

    Returns
    -------
    dict
        What RUN is to carry: the hint session, which ends at the destination.
    """
    session.phase("switch")
    session.paused_at = session.guest.pause(PAUSE_TIMEOUT)
    handed_over: dict[str, Any] = {}
    if hints is not None:
        # S5: from here on DONE is due at the destination. Its last STOP is written before the last sync.
        handed_over = hints.hand_over()
    # S12: the last sync publishes the side plane too. The senders are quiet since the last barrier.
    session.tracker.sync(last=True)
    if not session.options.postcopy:
        send_round(session, link, outgoing)
    barrier(link, outgoing)
    link.send(FrameType.STATE, session.guest.save_state())
    _send_lists(session, link)
    session.stop.check()
    return handed_over


def _send_lists(session: SourceSession, link: Link) -> None:
    tracker = session.tracker
    # As bitmaps: the guest is stopped, and what comes as runs may be millions of them (S8).
    discard, hinted = tracker.discard_pages(), tracker.hinted_pages()
    session.free = tracker.hinted
    if session.options.emulate_qemu:
        # What QEMU's source knows: a hinted page is as clean as one that was sent.
        discard, hinted = tracker.dirty, Bitmap(session.guest.npages)
    elif not link.capabilities.hinted_runs:
        # The destination asks for them instead, and is told FILL: it must drop what it has all the same.
        hinted = Bitmap(session.guest.npages)
    generation = link.session.generation
    for kind, pages in ((FrameType.DISCARD, discard), (FrameType.HINTED, hinted)):
        link.send(kind, encode_page_set(pages, generation=generation, list_id=LIST_ID))
    # S8: RUN follows only the acknowledgement of both lists, which here says that the state was loaded, too.
    header, _ = link.expect(FrameType.LISTS_ACK)
    if header.first != LIST_ID:
        raise ProtocolError("first", f"list {header.first} is acknowledged, {LIST_ID} was sent")
