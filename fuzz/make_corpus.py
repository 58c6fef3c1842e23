"""Write the first inputs of every target: ``python fuzz/make_corpus.py``. What a fuzzer found stands beside them."""

from __future__ import annotations

import json
import pathlib
import tempfile
import zlib

import numpy as np
from targets import NPAGES, PAGE, SESSION, guest

from pagecore import Bitmap, wire
from pagecore.migrate import Migration, Options
from pagecore.migrate.agreement import describe
from pagecore.migrate.chunks import Packer
from pagecore.migrate.report import save_report
from pagecore.saved_bitmap import SavedBitmap
from pagecore.working_set import WorkingSet

CORPUS = pathlib.Path(__file__).resolve().parent / "corpus"
Kind = wire.FrameType

EVERY_OTHER = Bitmap(NPAGES)
EVERY_OTHER.set_indices(np.arange(0, NPAGES, 2))
RUNS = [(0, 7), (9, 1), (500, 500)]
FEW = Bitmap(NPAGES)
FEW.set_runs(RUNS)
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


# As a sender says it.
AGREED = wire.Hello("control", "corpus", 0, PAGE, {0: 4096}, details=describe(Options(), "kvm"))


class Always:
    """Every chunk is packed."""

    def worth_packing(self, size: int) -> bool:
        return True

    def packed(self, size: int, packed: int, seconds: float) -> bool:
        return packed < size


def packed(pays: Always | None) -> bytes:
    """Two chunks, and the end."""
    packer = Packer(pays)
    made = b""
    for size in (20_000, 5):
        packer.space[:size] = bytes(size)
        made += bytes(packer.pack(size))
    return made + bytes(Packer.end())


def run_report() -> bytes:
    """The report of a small run."""
    outcome = Migration(Options(size=16 << 20, guest="process", dirty_rate=16 << 20)).run()
    assert outcome.verified, outcome.message
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "report.json"
        save_report(outcome, path)
        report = json.loads(path.read_bytes())
    # Short series: a fuzzer that changes one of a thousand equal numbers learns nothing.
    for columns in report["report"]["series"].values():
        for name in columns:
            columns[name] = columns[name][:3]
    text = json.dumps(report["report"], sort_keys=True, separators=(",", ":"))
    report["checksum"] = f"{zlib.crc32(text.encode()):08x}"
    return json.dumps(report).encode()


INPUTS = {
    "frames": {
        "runs": b"".join(run_frame(kind, 5, 2) for kind in (Kind.ZEROS, Kind.FILL, Kind.SENT, Kind.GONE, Kind.REQUEST)),
        "pages": run_frame(Kind.PAGES, 999, 1, bytes(PAGE)) + frame(Kind.END),
        "lists": frame(Kind.DISCARD, wire.encode_page_set(RUNS, NPAGES)) + frame(Kind.LISTS_ACK, first=1),
        "pause": frame(Kind.ALIVE, wire.encode_report({"paused": True})),
        "switch": frame(Kind.STATE, b"registers") + frame(Kind.RUN, wire.encode_report({"at": 1.5})),
    },
    "pages_at_once": {
        "two": frame(Kind.PAGES, bytes(PAGE), first=63, count=1, round=1)
        + frame(Kind.PAGES, bytes(range(256)) * 32, first=5, count=2, round=1)
        + frame(Kind.END),
        "again": 2 * frame(Kind.PAGES, b"\1" * PAGE, first=0, count=1, round=1, flags=wire.FrameFlags.AGAIN),
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
        "runs": wire.encode_audit(FEW, EVERY_OTHER, np.arange(16, dtype=np.uint64)),
        "bitmap": wire.encode_audit(EVERY_OTHER, Bitmap(NPAGES), np.zeros(16, np.uint64)),
    },
    "working_set": {
        "empty": WorkingSet([]).to_bytes(),
        "runs": WorkingSet([(0, 5, 2), (3, 0, 1), (0, 9, 100)]).to_bytes(),
        "huge": WorkingSet([(1, (1 << 52) - 1, (1 << 32) - 1)], 1 << 30).to_bytes(),
    },
    "handshake": {"two": TWO_REGIONS, "old": TWO_REGIONS.replace(b'"page_size"', b'"unknown"')},
    "handshake_in_pieces": {"two": b"\x21" + TWO_REGIONS, "behind": b"\x05" + TWO_REGIONS + b" ]"},
    "saved_bitmap": {
        "empty": SavedBitmap(Bitmap(0)).to_bytes(),
        "tail": SavedBitmap(EVERY_OTHER, PAGE, 7).to_bytes(),
    },
    "run_report": {"plain": run_report()},
    "chunks": {"raw": b"\x40" + packed(None), "packed": b"\x07" + packed(Always())},
    "agreement": {"kvm": wire.encode_hello(AGREED)},
    "guest_state": {"plain": guest().save_state()},
}

if __name__ == "__main__":
    for target, inputs in INPUTS.items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for name, data in inputs.items():
            (CORPUS / target / name).write_bytes(data)
