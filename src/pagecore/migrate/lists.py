"""The switch at the destination: precopy's memory becomes postcopy's, as the two lists of S8 say (D0)."""

from __future__ import annotations

import contextlib
import mmap
from typing import NamedTuple

from pagecore import Bitmap, PageState, Region, Userfaultfd
from pagecore.errors import ProtocolError
from pagecore.migrate.link import Link
from pagecore.migrate.options import PAGE_SIZE
from pagecore.wire import FrameType, decode_page_set

__all__ = ["Lists", "apply_lists", "discard_and_register", "read_lists"]


class Lists(NamedTuple):
    """What to discard, and which of that is hinted."""

    discard: Bitmap
    hinted: Bitmap
    id: int


def read_lists(link: Link, npages: int) -> Lists:
    """Receive both lists.

    Raises
    ------
    ProtocolError
        Naming the field.
    """
    generation = link.session.generation
    _, payload = link.expect(FrameType.DISCARD)
    discard = decode_page_set(payload, npages, generation=generation)
    _, payload = link.expect(FrameType.HINTED)
    hinted = decode_page_set(payload, npages, generation=generation)
    if discard.list_id != hinted.list_id:
        raise ProtocolError("list id", f"{hinted.list_id} of the hinted list is not {discard.list_id}")
    return Lists(discard.pages, hinted.pages, discard.list_id)


def apply_lists(memory: mmap.mmap, state: PageState, lists: Lists) -> None:
    """Without postcopy: everything is here but what is hinted, and that reads as zeros.

    Raises
    ------
    ProtocolError
        If a page would be missing for ever.
    """
    if lists.discard != lists.hinted:
        raise ProtocolError("discard", "names pages that nobody will send any more")
    _discard(memory, lists.discard)
    _switch(state, lists)


def discard_and_register(
    memory: mmap.mmap, state: PageState, lists: Lists, uffd: Userfaultfd, *, emulate_qemu: bool
) -> Region:
    """With postcopy: discard, turn the planes round, register; in this order, and nothing is registered before.

    Raises
    ------
    ProtocolError
        If a page would be missing for ever.
    """
    if emulate_qemu:
        # The source forgot the hinted pages: they are in no list, and may never have come.
        lists.discard.merge(_never_came(state))
    # D0: khugepaged would refill the holes with zeros before they are registered.
    _advise(memory, mmap.MADV_NOHUGEPAGE)
    _discard(memory, lists.discard)
    _switch(state, lists)
    region = uffd.register(memory, page_size=PAGE_SIZE, region_id=0)
    # D0: lifted again. Registered memory is left alone by khugepaged until it is unregistered.
    _advise(memory, mmap.MADV_HUGEPAGE)
    return region


def _discard(memory: mmap.mmap, pages: Bitmap) -> None:
    # One call a run, and runs are as long as can be: a wholly listed block of 2 MiB loses its page table, too.
    for first, count in pages.iter_runs():
        try:
            memory.madvise(mmap.MADV_DONTNEED, first * PAGE_SIZE, count * PAGE_SIZE)
        except OSError as error:
            raise OSError(error.errno, f"discarding {count} pages from page {first} on: {error.strerror}") from None


def _switch(state: PageState, lists: Lists) -> None:
    try:
        state.switch(lists.discard, lists.hinted)
    except ValueError as error:
        raise ProtocolError("list", str(error)) from None


def _never_came(state: PageState) -> Bitmap:
    came = state.received.copy()
    came.merge(state.zero)
    return ~came


def _advise(memory: mmap.mmap, advice: int) -> None:
    # EINVAL: a kernel without transparent huge pages, where there is nothing to keep away.
    with contextlib.suppress(OSError):
        memory.madvise(advice)
