"""Rows about ends: of the guest, of the handler, of the file."""

from __future__ import annotations

import os
import signal

from pagecore.conformance.rows import row
from pagecore.conformance.snapshot import NPAGES, PAGE
from pagecore.conformance.vmm import Failed, HandlerEnded, Vmm


@row("guest-death", "64 threads of a guest wait", "the guest is killed", "the next session is served, or a clean end")
def guest_death(vmm: Vmm) -> str:
    guest = os.fork()
    if guest == 0:
        try:
            vmm.map()
            vmm.pending([vmm.touch(page) for page in range(64)])
            vmm.hand_over()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(guest, 0)
    vmm.connect()
    try:
        vmm.start()
        vmm.expect_snapshot([9, 800])
    except (Failed, OSError):
        if vmm.handler_ended:
            raise HandlerEnded from None
        raise
    return f"the guest was ended by signal {os.WTERMSIG(status)}; the next session is served"


@row("paused", "the handler stands still", "faults and a discard pile up, then it goes on", "all are served")
def paused(vmm: Vmm) -> str:
    vmm.start()
    vmm.expect_snapshot([700])
    vmm.pause_handler()
    try:
        touches = {page: vmm.touch(page) for page in (701, 702, 703)}
        same = [vmm.touch(704) for _ in range(4)]
        vmm.pending([*touches.values(), *same])
        discards = [vmm.advise(700), vmm.advise(710, 10)]
        vmm.event_queued()
    finally:
        vmm.signal_handler(signal.SIGCONT)
    vmm.wait([*touches.values(), *same, *discards])
    for page, touch in [*touches.items(), *((704, touch) for touch in same)]:
        vmm.expect(page, vmm.snapshot.page(page), touch)
    vmm.expect_zeros([700, 710, 719])
    vmm.expect_snapshot([709, 720])
    return "seven faults and two discards"


@row("stop", "pages are missing", "SIGTERM to the handler", "it ends; missing pages never read as zeros", sigbus=True)
def stop(vmm: Vmm) -> str:
    vmm.start()
    vmm.expect_snapshot([33, 34])
    vmm.signal_handler(signal.SIGTERM)
    vmm.wait_ended()
    vmm.expect_snapshot([33, 34])
    return vmm.never_wrong(35)


@row(
    "kill",
    "pages are missing",
    "SIGKILL, then hand over to another",
    "it serves them; nothing is overwritten",
    restart=True,
)
def kill(vmm: Vmm) -> str:
    vmm.start()
    vmm.wait([vmm.write(page, 0, 0x77) for page in (33, 34)])
    vmm.signal_handler(signal.SIGKILL)
    vmm.wait_ended()
    seen = vmm.never_wrong(35)
    vmm.connect(another=True)
    vmm.hand_over()
    vmm.expect_snapshot([35, 900])
    for page in (33, 34):
        vmm.expect(page, b"\x77" + vmm.snapshot.page(page)[1:])
    return f"between the two {seen}"


@row(
    "file-cut",
    "the snapshot loses its second half",
    "read a page of it",
    "content or nothing, never zeros",
    sigbus=True,
)
def file_cut(vmm: Vmm) -> str:
    """The suite puts the file right afterwards."""
    vmm.start()
    vmm.expect_snapshot([0])
    os.truncate(vmm.snapshot.path, NPAGES // 2 * PAGE)
    return vmm.never_wrong(NPAGES - 100)
