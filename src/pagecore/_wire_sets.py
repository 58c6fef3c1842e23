"""Sets of pages on the wire: as runs or as a bitmap, whichever is smaller (S8, W3)."""

from __future__ import annotations

import struct
import zlib
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pagecore._bitmap import Bitmap
from pagecore._run_count import run_count
from pagecore.errors import ProtocolError

__all__ = [
    "BLOCK_PAGES",
    "Audit",
    "PageSet",
    "decode_audit",
    "decode_page_set",
    "encode_audit",
    "encode_page_set",
    "max_audit",
    "max_page_set",
]

Runs = npt.NDArray[np.int64]
Checksums = npt.NDArray[np.uint64]
Buffer = bytes | bytearray | memoryview


class PageSet(NamedTuple):
    """A decoded set of pages: a list of S8, or a bitmap of W3."""

    list_id: int
    generation: int
    # Whatever it came as: of the worst set the runs take a hundred times as much.
    pages: Bitmap

    @property
    def npages(self) -> int:
        """Pages of the region."""
        return self.pages.size

    @property
    def runs(self) -> Runs:
        """The set as an int64 array of shape (n, 2)."""
        return self.pages.runs()


class Audit(NamedTuple):
    """What was placed after the switch: pages of content, pages of zeros, and a sum of each block of content."""

    content: Bitmap
    zeros: Bitmap
    sums: Checksums


# Pages of one sum of an audit.
BLOCK_PAGES: Final = 64


_RUN_LIST: Final = 1
_BITMAP: Final = 2
# kind, reserved, generation, list id, pages of the region, entries (runs or words), CRC-32 of what follows
_PAGE_SET: Final = struct.Struct("<B3xIQQQI")
_RUN_BYTES: Final = 16
_WORD_BYTES: Final = 8


def _words(npages: int) -> int:
    return (npages + 63) // 64


def max_page_set(npages: int) -> int:
    """The most bytes that a set of this region's pages takes."""
    # The sender takes the smaller form, so that a bitmap bounds them both.
    return _PAGE_SET.size + _WORD_BYTES * _words(npages)


def max_audit(npages: int) -> int:
    """The most bytes that the audit of a region takes."""
    return 2 * max_page_set(npages) + 8 * _blocks(npages)


def _blocks(npages: int) -> int:
    return -(-npages // BLOCK_PAGES)


def encode_page_set(
    pages: Bitmap | npt.ArrayLike, npages: int | None = None, *, generation: int = 0, list_id: int = 0
) -> bytes:
    """A set of pages as runs or as a bitmap, whichever is smaller (S8, W3).

    Parameters
    ----------
    pages : Bitmap, or array_like of int of shape (n, 2)
        The set as a bitmap; its runs are never listed where the bitmap is the smaller form, so that the worst set costs
        no more than the bitmap does. Or runs of first page and page count; ascending, not empty, not touching.
    npages : int, optional
        Pages of the region; needed with runs.
    generation, list_id : int
        W6 and S9: told back by the receiver.

    Raises
    ------
    ValueError
        If the runs are out of order, or outside the region, or the bitmap is of another size.
    TypeError
        If runs come without `npages`.
    """
    if isinstance(pages, Bitmap):
        if npages is not None and pages.size != npages:
            raise ValueError(f"a bitmap of {pages.size} pages for a region of {npages}")
        npages = pages.size
        most = _words(npages) * _WORD_BYTES // _RUN_BYTES
        if run_count(pages, most) <= most:
            return _pack(_RUN_LIST, pages.runs(), npages, generation, list_id)
        return _pack(_BITMAP, pages, npages, generation, list_id)
    if npages is None:
        raise TypeError("runs need npages")
    array = np.ascontiguousarray(pages, dtype=np.int64).reshape(-1, 2)
    complaint = _complaint(array, npages)
    if complaint:
        raise ValueError(complaint)
    if len(array) * _RUN_BYTES <= _words(npages) * _WORD_BYTES:
        return _pack(_RUN_LIST, array, npages, generation, list_id)
    bitmap = Bitmap(npages)
    bitmap.set_runs(array)
    return _pack(_BITMAP, bitmap, npages, generation, list_id)


def _pack(kind: int, entries: Bitmap | Runs, npages: int, generation: int, list_id: int) -> bytes:
    if isinstance(entries, Bitmap):
        count, body = _words(npages), entries.to_bytes()
    else:
        count, body = len(entries), entries.astype("<u8", copy=False).tobytes()
    return b"".join((_PAGE_SET.pack(kind, generation, list_id, npages, count, zlib.crc32(body)), body))


def decode_page_set(payload: Buffer, npages: int, *, generation: int | None = None) -> PageSet:
    """The set of pages that `encode_page_set` made, size, generation, checksum and tail bits checked (W3).

    Parameters
    ----------
    payload : bytes-like
    npages : int
        Pages of the region, as this side knows it.
    generation : int, optional
        The one that the set must be of.

    Returns
    -------
    PageSet

    Raises
    ------
    ProtocolError
        Naming the field.
    """
    page_set, rest = _take_page_set(memoryview(payload), npages, generation)
    if len(rest):
        raise ProtocolError("page set", f"{len(rest)} bytes are left over")
    return page_set


def _take_page_set(payload: memoryview, npages: int, generation: int | None) -> tuple[PageSet, memoryview]:
    if len(payload) < _PAGE_SET.size:
        raise ProtocolError("page set", f"{len(payload)} bytes are fewer than {_PAGE_SET.size}")
    kind, its_generation, list_id, its_pages, entries, crc = _PAGE_SET.unpack_from(payload)
    if any(payload[1:4]):
        raise ProtocolError("page set reserved", "is not zero")
    if its_pages != npages:
        raise ProtocolError("page set size", f"{its_pages} pages; the region has {npages}")
    if generation is not None and its_generation != generation:
        raise ProtocolError("page set generation", f"{its_generation} is not the session's {generation}")
    if kind == _RUN_LIST:
        bound, entry = _words(npages) * _WORD_BYTES // _RUN_BYTES, _RUN_BYTES
    elif kind == _BITMAP:
        bound, entry = _words(npages), _WORD_BYTES
    else:
        raise ProtocolError("page set kind", f"{kind} is neither runs nor a bitmap")
    if entries > bound or (kind == _BITMAP and entries != bound):
        raise ProtocolError("page set entries", f"{entries}; {bound} fit {npages} pages")
    end = _PAGE_SET.size + entries * entry
    if len(payload) < end:
        raise ProtocolError("page set", f"{len(payload)} bytes; {entries} entries need {end}")
    body = payload[_PAGE_SET.size : end]
    if zlib.crc32(body) != crc:
        raise ProtocolError("page set crc", f"is not {crc:#010x}")
    pages = _pages_of_list(body, npages) if kind == _RUN_LIST else _pages_of_bitmap(body, npages)
    return PageSet(list_id, its_generation, pages), payload[end:]


def _pages_of_list(body: memoryview, npages: int) -> Bitmap:
    raw = np.frombuffer(body, dtype="<u8").reshape(-1, 2)
    # Before the cast: what does not fit an int64 would come out negative.
    if raw.size and int(raw.max()) > npages:
        raise ProtocolError("page set runs", f"{int(raw.max())} is past the region's {npages} pages")
    runs = raw.astype(np.int64)
    complaint = _complaint(runs, npages)
    if complaint:
        raise ProtocolError("page set runs", complaint)
    pages = Bitmap(npages)
    pages.set_runs(runs)
    return pages


def _pages_of_bitmap(body: memoryview, npages: int) -> Bitmap:
    words = np.frombuffer(body, dtype="<u8")
    tail = npages % 64
    if tail and int(words[-1]) >> tail:
        raise ProtocolError("page set tail", f"bits past page {npages} are set")
    return Bitmap.from_bytes(body, npages)


def _complaint(runs: Runs, npages: int) -> str | None:
    """Why these are not the runs of a set of pages; None where they are."""
    if not len(runs):
        return None
    first, count = runs[:, 0], runs[:, 1]
    if int(count.min()) < 1:
        return f"a run of {int(count.min())} pages"
    if int(first.min()) < 0 or int(count.max()) > npages:
        return f"a run is outside [0, {npages})"
    end = first + count
    if int(end.max()) > npages:
        return f"a run ends at {int(end.max())}; the region has {npages} pages"
    if len(runs) > 1 and bool((first[1:] <= end[:-1]).any()):
        return "runs overlap, touch or descend"
    return None


def encode_audit(content: Bitmap, zeros: Bitmap, sums: npt.ArrayLike, *, generation: int = 0) -> bytes:
    """What was placed after the switch: two page sets, then one word for each block of `BLOCK_PAGES` pages.

    Parameters
    ----------
    content, zeros : Bitmap
        Pages that were placed with content, and as zeros; of one size.
    sums : array_like of uint64
        One for each block of the region.
    generation : int
        That of the session, which the page sets carry.
    """
    words = np.ascontiguousarray(sums, dtype="<u8")
    if zeros.size != content.size:
        raise ValueError(f"zeros of {zeros.size} pages, content of {content.size}")
    if words.shape != (_blocks(content.size),):
        raise ValueError(f"checksums of shape {words.shape}, need ({_blocks(content.size)},)")
    sets = (encode_page_set(pages, generation=generation) for pages in (content, zeros))
    return b"".join((*sets, words.tobytes()))


def decode_audit(payload: Buffer, npages: int, *, generation: int | None = None) -> Audit:
    """The audit that `encode_audit` made.

    Raises
    ------
    ProtocolError
        Naming the field.
    """
    content, rest = _take_page_set(memoryview(payload), npages, generation)
    zeros, rest = _take_page_set(rest, npages, generation)
    if len(rest) != 8 * _blocks(npages):
        raise ProtocolError("audit checksums", f"{len(rest)} bytes; {npages} pages need {8 * _blocks(npages)}")
    return Audit(content.pages, zeros.pages, np.frombuffer(rest, dtype="<u8").astype(np.uint64))
