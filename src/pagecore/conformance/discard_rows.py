"""Rows about discards (balloon, MADV_DONTNEED): what the guest threw away never comes back."""

from __future__ import annotations

import mmap
import random

from pagecore.conformance.rows import row
from pagecore.conformance.snapshot import HOLE, NPAGES, PAGE
from pagecore.conformance.vmm import MADV_FREE, Failed, Vmm

PART = 16  # bytes: no copy reads a page in smaller pieces


@row("discard-present", "a page that was read", "discard it, read it", "zeros, not the snapshot again")
def discard_present(vmm: Vmm) -> str:
    vmm.start()
    vmm.expect_snapshot([10, 11])
    vmm.discard(10)
    vmm.expect_zeros([10])
    vmm.expect_snapshot([11, 12])
    return "zeros, and its neighbours are right"


@row("discard-missing", "a page that nobody has touched", "discard it, read it", "zeros")
def discard_missing(vmm: Vmm) -> str:
    vmm.start()
    vmm.discard(20)
    vmm.expect_zeros([20])
    vmm.expect_snapshot([19, 21])
    return "zeros, and its neighbours are right"


@row("balloon", "64 pages, half of them read", "discard them, write to them, discard again", "zeros, then the writes")
def balloon(vmm: Vmm) -> str:
    vmm.start()
    window = range(600, 664)
    vmm.expect_snapshot(window[::2])
    vmm.discard(600, 64)
    vmm.wait([vmm.write(page, 7, 0x42) for page in window])
    for page in window:
        vmm.expect(page, bytes(7) + b"\x42" + bytes(PAGE - 8))
    vmm.discard(600, 64)
    vmm.expect_zeros(window)
    vmm.expect_snapshot([599, 664])
    return "inflated, used and inflated again; the edges are right"


@row(
    "discard-queued",
    "a thread waits for a page",
    "discard that page, then hand over",
    "the waiter is let go; then zeros",
)
def discard_queued(vmm: Vmm) -> str:
    vmm.map()
    touch = vmm.touch(30)
    vmm.pending([touch])
    discard = vmm.advise(30)
    vmm.event_queued()
    vmm.hand_over()
    vmm.wait([touch, discard])
    if not _is_mixture(touch.result, vmm.snapshot.page(30)):
        raise Failed("the waiter reads neither the snapshot nor zeros")
    vmm.expect_zeros([30])
    vmm.expect_snapshot([31])
    return f"the waiter read {'the snapshot' if any(touch.result) else 'zeros'}, then there were zeros"


@row("again", "four threads wait, and a discard elsewhere is queued", "hand over", "EAGAIN is tried again")
def again(vmm: Vmm) -> str:
    vmm.map()
    touches = {page: vmm.touch(page) for page in (50, 60, 70, 80)}
    vmm.pending(touches.values())
    discard = vmm.advise(100, 8)
    vmm.event_queued()
    vmm.hand_over()
    vmm.wait([*touches.values(), discard])
    for page, touch in touches.items():
        vmm.expect(page, vmm.snapshot.page(page), touch)
    vmm.expect_zeros([100, 107])
    vmm.expect_snapshot([99, 108])
    return "four pages and the discard"


@row("late-data", "a page is being fetched", "discard it meanwhile, 200 times", "zeros afterwards, every time")
def late_data(vmm: Vmm) -> str:
    vmm.start()
    served = 0
    for page in range(NPAGES - 200, NPAGES):
        touch = vmm.touch(page)
        vmm.wait([touch, vmm.advise(page)])
        served += touch.result == vmm.snapshot.page(page)
        if not _is_mixture(touch.result, vmm.snapshot.page(page)):
            raise Failed(f"page {page} reads as neither the snapshot nor zeros")
        vmm.expect_zeros([page])
    return f"{served} fetches were faster than the discard, {200 - served} were not"


@row(
    "lazily-free", "a page that was written to", "MADV_FREE it, use it", "old content or zeros; a fault on it is served"
)
def lazily_free(vmm: Vmm) -> str:
    vmm.start()
    vmm.wait([vmm.write(page, 0, 1) for page in range(110, 118)])
    vmm.wait([vmm.advise(110, 8, MADV_FREE)])
    kept = 0
    for page in range(110, 118):
        touch = vmm.touch(page)
        vmm.wait([touch])
        old = b"\x01" + vmm.snapshot.page(page)[1:]
        if touch.result not in (old, bytes(PAGE)):
            raise Failed(f"page {page} reads as neither what it was nor zeros")
        kept += touch.result == old
    vmm.discard(110, 8)
    vmm.expect_zeros(range(110, 118))
    return f"{kept} of 8 pages had been kept"


@row(
    "flood",
    "four threads read",
    "discard every other page, one by one",
    "no discard waits; zeros there, content elsewhere",
)
def flood(vmm: Vmm) -> str:
    vmm.start()
    rounds = random.Random(7)
    kept = [page for page in range(1, NPAGES, 2) if not HOLE[0] <= page < sum(HOLE)]
    longest = 0.0
    for page in range(0, NPAGES, 2):
        discard = vmm.advise(page)
        touches = [(other, vmm.touch(other)) for other in rounds.sample(kept, 4)] if page % 16 == 0 else []
        vmm.wait([discard, *(touch for _, touch in touches)])
        longest = max(longest, discard.seconds)
        for other, touch in touches:
            vmm.expect(other, vmm.snapshot.page(other), touch)
    vmm.expect_zeros(range(0, NPAGES, 16))
    vmm.expect_snapshot(kept[::8])
    return f"{NPAGES // 2} discards, the longest took {longest * 1e3:.1f} ms"


@row("discard-all", "pages were read and written", "discard all of the memory", "zeros everywhere")
def discard_all(vmm: Vmm) -> str:
    vmm.start(cuts=(NPAGES // 2,))
    vmm.expect_snapshot([0, 100, 200, 400, NPAGES - 1])
    vmm.wait([vmm.advise(area.first, area.count, mmap.MADV_DONTNEED) for area in vmm.areas])
    vmm.expect_zeros(range(0, NPAGES, 37))
    return "zeros everywhere, in both regions"


def _is_mixture(found: bytes, content: bytes) -> bool:
    """Whether each part is the content's or zeros: a read may be under way when its page is discarded."""
    parts = range(0, PAGE, PART)
    return all(found[at : at + PART] in (content[at : at + PART], bytes(PART)) for at in parts)
