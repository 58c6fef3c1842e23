"""Write the first inputs of every target: ``python fuzz/make_corpus.py``. What a fuzzer found stands beside them."""

from __future__ import annotations

import json
import pathlib

import numpy as np
from targets import NPAGES, PAGE, SESSION, guest

from pagecore import Bitmap, wire
from pagecore.working_set import WorkingSet

CORPUS = pathlib.Path(__file__).resolve().parent / "corpus"
Kind = wire.FrameType

EVERY_OTHER = Bitmap(NPAGES)
EVERY_OTHER.set_indices(np.arange(0, NPAGES, 2))
RUNS = [(0, 7), (9, 1), (500, 500)]
HELLO = wire.encode_hello(wire.Hello("control", "corpus", 2, PAGE, {0: NPAGES, 3: 64}, details={"guest": "kvm"}))
REGION = {"base_host_virt_addr": 0x7F0000000000, "size": 4 << 20, "offset": 0, "page_size": PAGE, "page_size_kib": PAGE}
NEXT_REGION = {**REGION, "base_host_virt_addr": 0x7E0000000000, "offset": 4 << 20}
TWO_REGIONS = json.dumps([REGION, NEXT_REGION]).encode()


def frame(kind: wire.FrameType, payload: bytes = b"", **fields: int) -> bytes:
    """One frame of the targets' session."""
    return wire.encode_frame(kind, payload, generation=SESSION.generation, **fields)


def run_frame(kind: wire.FrameType, first: int, count: int, payload: bytes = b"") -> bytes:
    """A frame that names pages."""
    return frame(kind, payload, first=first, count=count)


INPUTS = {
    "frames": {
        "runs": b"".join(run_frame(kind, 5, 2) for kind in (Kind.ZEROS, Kind.FILL, Kind.SENT, Kind.GONE, Kind.REQUEST)),
        "pages": run_frame(Kind.PAGES, 999, 1, bytes(PAGE)) + frame(Kind.END),
        "lists": frame(Kind.DISCARD, wire.encode_page_set(RUNS, NPAGES)) + frame(Kind.LISTS_ACK, first=1),
        "switch": frame(Kind.STATE, b"registers") + frame(Kind.RUN, wire.encode_report({"at": 1.5})),
    },
    "greeting": {
        "hello": wire.encode_frame(Kind.HELLO, HELLO),
        "error": wire.encode_frame(Kind.ERROR, b'{"error":"no"}'),
    },
    "hello": {"plain": HELLO, "brackets": b"[" * 5000, "number": b'{"version":' + b"9" * 5000 + b"}"},
    "report": {"plain": wire.encode_report({"error": "x" * 2000, "seconds": 1e300, "none": None, "flag": True})},
    "page_set": {
        "runs": wire.encode_page_set(RUNS, NPAGES, generation=2, list_id=9),
        "bitmap": wire.encode_page_set(EVERY_OTHER, generation=2),
        "empty": wire.encode_page_set([], 0),
        "one": wire.encode_page_set([(63, 1)], 64),
    },
    "audit": {
        "runs": wire.encode_audit(RUNS, np.arange(508, dtype=np.uint64), NPAGES),
        "bitmap": wire.encode_audit(EVERY_OTHER.runs(), np.arange(500, dtype=np.uint64), NPAGES),
    },
    "working_set": {
        "empty": WorkingSet([]).to_bytes(),
        "runs": WorkingSet([(0, 5, 2), (3, 0, 1), (0, 9, 100)]).to_bytes(),
        "huge": WorkingSet([(1, (1 << 52) - 1, (1 << 32) - 1)], 1 << 30).to_bytes(),
    },
    "handshake": {"two": TWO_REGIONS, "old": TWO_REGIONS.replace(b'"page_size"', b'"unknown"')},
    "handshake_in_pieces": {"two": b"\x21" + TWO_REGIONS, "behind": b"\x05" + TWO_REGIONS + b" ]"},
    "guest_state": {"plain": guest().save_state()},
}

if __name__ == "__main__":
    for target, inputs in INPUTS.items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for name, data in inputs.items():
            (CORPUS / target / name).write_bytes(data)
