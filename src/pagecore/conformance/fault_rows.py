"""Rows about faults: content, addresses, several waiters, pages that are there already."""

from __future__ import annotations

import mmap
import random

from pagecore import Feature
from pagecore.conformance.rows import row
from pagecore.conformance.snapshot import HOLE, NPAGES, PAGE
from pagecore.conformance.vmm import Failed, Vmm

OURS = b"placed by the VMM before there was a handler".ljust(PAGE, b".")


@row("first-touch", "a missing page", "read it", "the page has the snapshot's content")
def first_touch(vmm: Vmm) -> str:
    vmm.start()
    pages = (NPAGES // 2, 0, NPAGES - 1)
    vmm.expect_snapshot(pages)
    return "the first, a middle and the last page are right"


@row("write", "a missing page", "write one byte", "the rest of the page is the snapshot's, and the byte stays")
def write(vmm: Vmm) -> str:
    vmm.start()
    vmm.wait([vmm.write(40, 100, 0x5A), vmm.write(41, PAGE - 1, 0xA5)])
    first, last = vmm.snapshot.page(40), vmm.snapshot.page(41)
    vmm.expect(40, first[:100] + b"\x5a" + first[101:])
    vmm.expect(41, last[:-1] + b"\xa5")
    return "two pages hold both"


@row("exact-address", "faults report exact addresses", "read the last bytes of a page", "the whole page is placed")
def exact_address(vmm: Vmm) -> str:
    vmm.start(features=Feature.EVENT_REMOVE | Feature.EXACT_ADDRESS)
    for page, offset in ((7, PAGE - 1), (8, 1234)):
        touch = vmm.touch(page, offset=offset, length=1)
        vmm.wait([touch])
        vmm.expect_snapshot([page])
    return "the address was rounded down to the page"


@row("hole", "the snapshot has a hole there", "read it", "zeros")
def hole(vmm: Vmm) -> str:
    vmm.start()
    vmm.expect_zeros([HOLE[0], HOLE[0] + 13, HOLE[0] + HOLE[1] - 1])
    vmm.expect_snapshot([HOLE[0] - 1, HOLE[0] + HOLE[1]])
    return "zeros, and its neighbours are right"


@row("regions", "three regions, not in the order of their addresses", "read the edges of each", "offsets are obeyed")
def regions(vmm: Vmm) -> str:
    vmm.map(cuts=(300, 301))
    # Whatever order the kernel chose: the middle one goes first.
    vmm.areas = [vmm.areas[1], vmm.areas[2], vmm.areas[0]]
    vmm.hand_over()
    vmm.expect_snapshot([301, 300, 299, NPAGES - 1, 0])
    return "each region has its own part of the snapshot"


@row("many-regions", "128 regions: a handshake of over 8 KiB", "read a page of each", "no region is forgotten")
def many_regions(vmm: Vmm) -> str:
    step = NPAGES // 128
    vmm.start(cuts=range(step, NPAGES, step))
    expected = [page for page in range(0, NPAGES, step) if not HOLE[0] <= page < sum(HOLE)]
    vmm.expect_snapshot(expected)
    return f"{len(expected)} regions are right"


@row("queued-faults", "eight threads wait before the handler connects", "hand over", "each gets its page")
def queued_faults(vmm: Vmm) -> str:
    vmm.map()
    pages = [5 + 100 * number for number in range(8) if not HOLE[0] <= 5 + 100 * number < sum(HOLE)]
    touches = {page: vmm.touch(page) for page in pages}
    vmm.pending(touches.values())
    vmm.hand_over()
    vmm.wait(touches.values())
    for page, touch in touches.items():
        vmm.expect(page, vmm.snapshot.page(page), touch)
    return f"{len(pages)} faults were queued, none was lost"


@row("one-page", "eight threads wait for one page", "hand over", "all are woken; EEXIST is no error")
def one_page(vmm: Vmm) -> str:
    vmm.map()
    touches = [vmm.touch(77) for _ in range(8)]
    vmm.pending(touches)
    vmm.hand_over()
    vmm.wait(touches)
    for touch in touches:
        vmm.expect(77, vmm.snapshot.page(77), touch)
    vmm.expect_snapshot([78])
    return "eight threads read the page, and the next page is served too"


@row("asleep", "a page is there, and its waiter was not woken", "hand over", "it is woken; nothing is overwritten")
def asleep(vmm: Vmm) -> str:
    vmm.map()
    touch = vmm.touch(90)
    vmm.pending([touch])
    vmm.place(90, OURS, wake=False)
    vmm.hand_over()
    vmm.expect(90, OURS, touch)
    vmm.expect_snapshot([91])
    return "the waiter was woken, and reads the page that was there"


@row("present", "every third page is there already", "read all others", "they are right, and none is overwritten")
def present(vmm: Vmm) -> str:
    vmm.map()
    window = range(500, 596)
    for page in window[::3]:
        vmm.place(page, OURS)
    vmm.hand_over()
    missing = [page for page in window if page not in window[::3]]
    vmm.expect_snapshot(missing)
    for page in window[::3]:
        vmm.expect(page, OURS)
    return f"{len(missing)} pages placed around {len(window[::3])} that were there"


@row("edge", "a page in the midst is read-only: the mapping is split", "read around it", "ENOENT is no error")
def edge(vmm: Vmm) -> str:
    vmm.map()
    vmm.protect(401, mmap.PROT_READ)
    vmm.hand_over()
    vmm.expect_snapshot([400, 402, 401, 403])
    return "pages on both sides, and the read-only one"


@row("huge-pages", "guest memory in pages of 2 MiB", "read, discard, read", "whole huge pages, then zeros")
def huge_pages(vmm: Vmm) -> str:
    half = NPAGES // 2
    vmm.map(page_size=half * PAGE)
    vmm.hand_over()
    vmm.expect_snapshot([half + 7, half, NPAGES - 1, 5, half - 1])
    vmm.expect_zeros([HOLE[0]])
    vmm.discard(half, half)
    vmm.expect_zeros([half, half + 7])
    vmm.expect_snapshot([5])
    return "two huge pages, and zeros for the one that was discarded"


@row("storm", "eight threads", "read all pages, two and two in one order", "every byte is right")
def storm(vmm: Vmm) -> str:
    vmm.start()
    rounds = random.Random(20261)
    orders = [rounds.sample(range(NPAGES), NPAGES) for _ in range(4)]
    sweeps = [vmm.sweep(order) for order in orders * 2]
    vmm.wait(sweeps)
    wrong = [sweep.result for sweep in sweeps if sweep.result is not None]
    if wrong:
        raise Failed(f"pages {wrong} were wrong")
    return f"{8 * NPAGES} reads in {max(sweep.seconds for sweep in sweeps) * 1e3:.0f} ms"


@row("sweep", "one thread", "read every page once", "every byte is right")
def sweep(vmm: Vmm) -> str:
    vmm.start()
    order = random.Random(5).sample(range(NPAGES), NPAGES)
    times = []
    for page in order:
        touch = vmm.touch(page)
        vmm.expect(page, vmm.snapshot.page(page), touch)
        times.append(touch.seconds)
    times.sort()
    if bytes(vmm.areas[0].memory[:]) != vmm.snapshot.content:
        raise Failed("the memory changed afterwards")
    return f"p50 {times[len(times) // 2] * 1e6:.0f} us, p99 {times[len(times) * 99 // 100] * 1e6:.0f} us"
