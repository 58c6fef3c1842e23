"""A bitmap in a file: it comes back as it was, and a damaged one is refused with the name of the field."""

from __future__ import annotations

import os
import stat
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from pagecore import Bitmap, ProtocolError, SavedBitmap
from pagecore.files import read_bounded, write_whole

HEADER = struct.Struct("<4sHHIQQI")


def some(pages: int) -> Bitmap:
    bitmap = Bitmap(pages)
    bitmap.set_indices([page for page in range(pages) if page % 3 == 1])
    return bitmap


def file_of(pages: int = 100, **fields: Any) -> bytes:
    """A file with some fields changed by somebody who knows how to make the checksum."""
    values = {"magic": b"PGBM", "version": 1, "reserved": 0, "generation": 7, "page_size": 4096, "pages": pages}
    body = fields.pop("body", some(100).to_bytes())
    values.update(fields)
    head = HEADER.pack(*values.values(), 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body


@pytest.mark.parametrize("pages", [0, 1, 63, 64, 65, 1000])
def test_it_comes_back_as_it_was(pages: int, tmp_path: Path) -> None:
    given = SavedBitmap(some(pages), page_size=1 << 21, generation=5)
    given.save(tmp_path / "file")
    assert SavedBitmap.load(tmp_path / "file") == given
    assert len((tmp_path / "file").read_bytes()) == 32 + (pages + 63) // 64 * 8


def test_the_file_is_as_the_documentation_has_it() -> None:
    assert SavedBitmap(some(100), generation=7).to_bytes() == file_of()


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"", "length"),
        (file_of()[:31], "length"),
        (file_of(magic=b"PGWS"), "magic"),
        (file_of(version=2), "version"),
        (file_of(reserved=1), "reserved"),
        (file_of(page_size=4097), "page size"),
        (file_of(page_size=0), "page size"),
        (file_of(pages=(1 << 32) + 1), "pages"),
        (file_of(pages=1 << 32), "pages"),
        (file_of(pages=129), "pages"),
        (file_of()[:-1], "pages"),
        (file_of() + b"\0", "pages"),
        (file_of(pages=4, body=b"\x10" + bytes(7)), "tail"),
    ],
)
def test_what_cannot_be_right_is_refused_and_the_field_named(data: bytes, field: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        SavedBitmap.from_bytes(data)
    assert refused.value.field == field


def test_no_changed_bit_goes_unnoticed() -> None:
    data = SavedBitmap(some(100), generation=7).to_bytes()
    for at in range(8 * len(data)):
        spoiled = bytearray(data)
        spoiled[at // 8] ^= 1 << at % 8
        with pytest.raises(ProtocolError):
            SavedBitmap.from_bytes(bytes(spoiled))


@pytest.mark.parametrize(
    "values", [{"page_size": 3}, {"page_size": 0}, {"page_size": 1 << 64}, {"generation": -1}, {"generation": 1 << 32}]
)
def test_what_a_file_cannot_hold_is_refused_at_once(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(values.values())))):
        SavedBitmap(Bitmap(1), **values)


# ------------------------------------------------------------------------------------------------- files in general


def test_a_file_has_the_permissions_of_any_new_one(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"x")
    (tmp_path / "another").touch()
    assert stat.S_IMODE(os.stat(tmp_path / "file").st_mode) == stat.S_IMODE(os.stat(tmp_path / "another").st_mode)


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"old")
    with pytest.MonkeyPatch.context() as patch:

        def fail(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_read_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bounded(tmp_path / "file", 5) == b"12345"
    with pytest.raises(ProtocolError, match="more than 4 bytes"):
        read_bounded(tmp_path / "file", 4)
