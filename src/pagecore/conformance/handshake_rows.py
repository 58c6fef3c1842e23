"""Rows about the handshake: every version of it, in pieces, and what must be refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from pagecore.conformance.rows import row
from pagecore.conformance.snapshot import NPAGES, PAGE
from pagecore.conformance.vmm import QUIET, Failed, Vmm


def _hand_over(vmm: Vmm, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    body = json.dumps([change(area.fields()) for area in vmm.areas]).encode()
    vmm.hand_over(body)


@row("fields-1.1", "Firecracker 1.1 to 1.6: no page size", "hand over", "served in pages of 4 KiB")
def oldest_fields(vmm: Vmm) -> str:
    vmm.map(cuts=(64,))
    _hand_over(vmm, lambda fields: {key: fields[key] for key in ("base_host_virt_addr", "size", "offset")})
    vmm.expect_snapshot([63, 64])
    return "served"


@row("fields-1.7", "Firecracker 1.7 to 1.11: page_size_kib, in bytes", "hand over", "served in pages of 4 KiB")
def old_fields(vmm: Vmm) -> str:
    vmm.map()
    _hand_over(vmm, lambda fields: {key: value for key, value in fields.items() if key != "page_size"})
    vmm.expect_snapshot([1, NPAGES - 2])
    return "served"


@row("fields-new", "a newer VMM: fields that nobody knows", "hand over", "they are ignored")
def new_fields(vmm: Vmm) -> str:
    vmm.map()
    _hand_over(vmm, lambda fields: {"gpa_start": 2**40, **fields, "a_new_field": {"deep": [1, None, "text"]}})
    vmm.expect_snapshot([2, NPAGES - 3])
    return "served"


@row("in-pieces", "the handshake comes in five pieces", "hand over", "it is put together")
def in_pieces(vmm: Vmm) -> str:
    vmm.map(cuts=(200, 400))
    vmm.hand_over(parts=5)
    vmm.expect_snapshot([199, 200, 400])
    return "served"


@row("early-close", "Firecracker before 1.12 closes the socket at once", "hand over, close", "the guest is served on")
def early_close(vmm: Vmm) -> str:
    vmm.start()
    assert vmm.stream is not None
    vmm.stream.close()
    vmm.expect_snapshot([3, 600])
    time.sleep(QUIET)  # a handler that takes the close for the guest's end has the time to
    vmm.expect_snapshot([4, 700, NPAGES - 1])
    return "served after the close"


def _refused(vmm: Vmm, *, page: int | None = None) -> str:
    """After a handshake that cannot be right: refused at once, nothing placed; a good one is welcome afterwards."""
    vmm.wait_refused()
    seen = "" if page is None else f", {vmm.never_wrong(page)}"
    try:
        vmm.follower().expect_snapshot([4])
    except (Failed, OSError):
        if vmm.handler_ended:
            return f"the handler ended{seen}"
        raise
    return f"the connection was closed{seen}; the next session is served"


@row("refuse-garbage", "what comes is no JSON", "hand over", "refused, and the next session is served")
def refuse_garbage(vmm: Vmm) -> str:
    vmm.map()
    vmm.hand_over(b"\x00\xff not JSON at all [{")
    return _refused(vmm)


@row("refuse-no-descriptor", "no descriptor comes with it", "hand over", "refused, and the next session is served")
def refuse_no_descriptor(vmm: Vmm) -> str:
    vmm.map()
    vmm.connect().sendall(json.dumps([area.fields() for area in vmm.areas]).encode())
    return _refused(vmm)


@row("refuse-overlap", "two regions overlap", "hand over", "refused, and no page is placed", sigbus=True)
def refuse_overlap(vmm: Vmm) -> str:
    vmm.map(cuts=(512,))
    fields = [area.fields() for area in vmm.areas]
    fields[1]["base_host_virt_addr"] = fields[0]["base_host_virt_addr"] + PAGE
    vmm.hand_over(json.dumps(fields).encode())
    return _refused(vmm, page=100)


@row("refuse-beyond", "a region lies beyond the end of the snapshot", "hand over", "refused; never zeros", sigbus=True)
def refuse_beyond(vmm: Vmm) -> str:
    vmm.map()
    fields = vmm.areas[0].fields()
    fields["offset"] = PAGE
    vmm.hand_over(json.dumps([fields]).encode())
    return _refused(vmm, page=NPAGES - 1)


@row("refuse-page-size", "a page size of 3000 bytes", "hand over", "refused", sigbus=True)
def refuse_page_size(vmm: Vmm) -> str:
    vmm.map()
    fields = vmm.areas[0].fields() | {"page_size": 3000, "page_size_kib": 3000}
    vmm.hand_over(json.dumps([fields]).encode())
    return _refused(vmm, page=1)


@row("refuse-nothing", "no region at all", "hand over", "refused")
def refuse_nothing(vmm: Vmm) -> str:
    vmm.map()
    vmm.hand_over(b"[]")
    return _refused(vmm)
