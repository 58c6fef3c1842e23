"""SavedBitmap: a bitmap of pages in a checksummed file."""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass

import numpy as np

from pagecore._bitmap import Bitmap
from pagecore.errors import ProtocolError
from pagecore.files import read_bounded, write_whole

__all__ = ["SavedBitmap"]

MAGIC = b"PGBM"
VERSION = 1
# magic, version, reserved, generation, page size, pages, crc32 of the header before it and of the words
_HEADER = struct.Struct("<4sHHIQQI")
_CHECKED = _HEADER.size - 4
# 16 TiB of pages of 4 KiB, in a file of 512 MiB.
MAX_PAGES = 1 << 32


@dataclass(frozen=True)
class SavedBitmap:
    """SavedBitmap(bitmap, page_size=4096, generation=0)

    A bitmap of pages, and what it is of.

    Attributes
    ----------
    bitmap : Bitmap
        At most 2**32 pages.
    page_size : int
        Bytes; a power of two.
    generation : int
        Of the session that it belongs to (W6); 0 where there is none.

    Raises
    ------
    ValueError
        A number outside its bounds.

    Notes
    -----
    The file is little-endian: 32 bytes ``<4sHHIQQI`` (magic PGBM, version 1, 0, generation, page size, pages,
    checksum), then 64-bit words, the bits past the last page zero (W3). The checksum is the CRC-32 of all the rest.
    """

    bitmap: Bitmap
    page_size: int = 4096
    generation: int = 0

    def __post_init__(self) -> None:
        """Refuse what a file cannot hold."""
        if self.page_size <= 0 or self.page_size & (self.page_size - 1) or self.page_size >= 1 << 64:
            raise ValueError(f"page size {self.page_size} is not a power of two")
        if not 0 <= self.generation < 1 << 32:
            raise ValueError(f"generation {self.generation} is outside [0, {1 << 32})")
        if self.bitmap.size > MAX_PAGES:
            raise ValueError(f"{self.bitmap.size} pages are more than {MAX_PAGES}")

    def to_bytes(self) -> bytes:
        """The file's content."""
        header = _HEADER.pack(MAGIC, VERSION, 0, self.generation, self.page_size, self.bitmap.size, 0)[:_CHECKED]
        body = self.bitmap.to_bytes()
        return b"".join((header, zlib.crc32(body, zlib.crc32(header)).to_bytes(4, "little"), body))

    @classmethod
    def from_bytes(cls, data: bytes) -> SavedBitmap:
        """Parse a file's content.

        Parameters
        ----------
        data : bytes
            All of it.

        Returns
        -------
        SavedBitmap

        Raises
        ------
        ProtocolError
            It is none; names the field that is wrong. Memory is taken for what is there alone, whatever the header
            says.
        """
        if len(data) < _HEADER.size:
            raise ProtocolError("length", f"{len(data)} bytes are fewer than the header's {_HEADER.size}")
        magic, version, reserved, generation, page_size, pages, checksum = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise ProtocolError("magic", f"{magic!r} is not {MAGIC!r}: not a bitmap")
        if version != VERSION:
            raise ProtocolError("version", f"{version} is not {VERSION}")
        if reserved:
            raise ProtocolError("reserved", f"{reserved} is not 0")
        if pages > MAX_PAGES:
            raise ProtocolError("pages", f"{pages} are more than {MAX_PAGES}")
        words = (pages + 63) // 64
        if len(data) != _HEADER.size + 8 * words:
            raise ProtocolError("pages", f"{pages} need {8 * words} bytes, not {len(data) - _HEADER.size}")
        body = memoryview(data)[_HEADER.size :]
        found = zlib.crc32(body, zlib.crc32(data[:_CHECKED]))
        if found != checksum:
            raise ProtocolError("checksum", f"{found:#010x} is not {checksum:#010x}: the file is damaged")
        if pages % 64 and int(np.frombuffer(body, "<u8")[-1]) >> pages % 64:
            raise ProtocolError("tail", f"bits past page {pages} are set")
        try:
            return cls(Bitmap.from_bytes(body, pages), page_size, generation)
        except ValueError as error:
            raise ProtocolError("page size", str(error)) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all: whoever reads it meanwhile finds the old one.

        Raises
        ------
        OSError
            It could not be written; the old file is as it was.
        """
        write_whole(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SavedBitmap:
        """Read a file that `save` wrote.

        Raises
        ------
        ProtocolError, OSError
            As `from_bytes`; the file could not be read.
        """
        return cls.from_bytes(read_bounded(path, _HEADER.size + MAX_PAGES // 8))
