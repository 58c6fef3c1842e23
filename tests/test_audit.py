"""What was placed, as an audit recorded it, against the frozen source."""

from __future__ import annotations

import pytest

from concurrency import wait_until
from pagecore import Bitmap, PageState
from pagecore.testing import PlacementAudit, compare_placed
from placement_rig import ZEROS, header, pages_frame, pushed, served
from uffd_helpers import PAGE

NPAGES = 130
CONTENT = {number: bytes([number]) * PAGE for number in (3, 5, 64, 129)}


@pytest.fixture
def audit() -> PlacementAudit:
    """Of a region in which four pages were placed with content, and two as zeros."""
    state = PageState(NPAGES)
    audit = PlacementAudit(NPAGES, state=state)
    with served(NPAGES) as rig, pushed(rig, states=[state], observer=audit) as (_, peer):
        for number, data in CONTENT.items():
            peer.bulk[0].sendall(pages_frame(number, data))
        peer.bulk[0].sendall(header(ZEROS, 7, 1) + header(ZEROS, 100, 1))
        wait_until(lambda: state.settled().count() == 6, "what was sent")
    return audit


def wrong(audit: PlacementAudit, **changed: bytes) -> list[int]:
    """What was placed wrong if the source has this in some of its pages."""
    memory = bytearray(NPAGES * PAGE)
    for number, data in {**CONTENT, **{int(name[1:]): data for name, data in changed.items()}}.items():
        memory[number * PAGE : (number + 1) * PAGE] = data
    return compare_placed(memory, audit.content, audit.zeros, audit.sums()).indices().tolist()


@pytest.mark.kernel
def test_pages_that_were_placed_as_something_else_are_found(audit: PlacementAudit) -> None:
    assert audit.content.indices().tolist() == [3, 5, 64, 129]
    assert audit.zeros.indices().tolist() == [7, 100]
    assert audit.placements == 6
    assert wrong(audit) == []
    assert wrong(audit, p9=CONTENT[3]) == [], "it was not placed, and may be anything"
    # Content is judged by blocks of 64 pages, zeros page by page.
    assert wrong(audit, p5=bytes(PAGE)) == [3, 5]
    assert wrong(audit, p129=CONTENT[3]) == [129]
    assert wrong(audit, p3=CONTENT[5], p5=CONTENT[3]) == [3, 5], "two changed places"
    assert wrong(audit, p7=CONTENT[3], p64=CONTENT[64][:-1] + b"!") == [7, 64]


@pytest.mark.kernel
def test_what_does_not_fit_is_refused(audit: PlacementAudit) -> None:
    memory, sums = bytes(NPAGES * PAGE), audit.sums()
    with pytest.raises(ValueError, match="do not fit"):
        compare_placed(memory[PAGE:], audit.content, audit.zeros, sums)
    with pytest.raises(ValueError, match="do not fit"):
        compare_placed(memory, audit.content, Bitmap(NPAGES - 1), sums)
    with pytest.raises(ValueError, match=r"sums of shape \(2,\), need \(3,\)"):
        compare_placed(memory, audit.content, audit.zeros, sums[1:])
