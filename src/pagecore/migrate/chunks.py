"""The stream between two link helpers: bounded chunks, plain or compressed, and an end that is said (design section 9).

====== ==== ====== ==========================================================
offset size field  meaning
====== ==== ====== ==========================================================
0      1    kind   0 as it is, 1 zstd, 2 the end
1      3           zero
4      4    size   bytes that follow, little-endian
8      4    plain  bytes that they stand for; 0 at the end
====== ==== ====== ==========================================================

A stream that stops without its end was cut, whoever did it.
"""

from __future__ import annotations

import struct
import time
from typing import Any, Final

from pagecore.errors import ProtocolError
from pagecore.migrate.pays import Pays

__all__ = ["CHUNK", "PREFACE", "Packer", "Unpacker"]

# Both helpers say this first: it tells apart what speaks TLS, but not this.
PREFACE: Final = b"PGCLINK1"
# What is compressed at once, and the most that a peer can make us hold.
CHUNK: Final = 256 << 10
# Shorter pieces are control frames, or single pages.
WORTH_A_TRY: Final = 16 << 10
RAW, ZSTD, END = 0, 1, 2
HEADER: Final = struct.Struct("<B3xII")
# Level 1: faster than most links, and not much larger than the next few levels.
LEVEL: Final = 1


class Packer:
    """Makes chunks of plain bytes, one at a time.

    Parameters
    ----------
    pays : Pays or None
        Says which ones to compress; None: nothing is.
    """

    def __init__(self, pays: Pays | None) -> None:
        self._buffer = bytearray(HEADER.size + CHUNK)
        self._view = memoryview(self._buffer)
        self._pays = pays
        self._zstd: Any = None
        if pays is not None:
            import zstandard

            self._zstd = zstandard.ZstdCompressor(level=LEVEL)

    @property
    def space(self) -> memoryview:
        """Where the plain bytes of the next chunk go."""
        return self._view[HEADER.size :]

    def pack(self, size: int) -> memoryview:
        """The chunk of the first bytes of `space`; it is good until they change."""
        plain = self._view[HEADER.size : HEADER.size + size]
        if self._pays is not None and size >= WORTH_A_TRY and self._pays.worth_packing(size):
            began = time.perf_counter()
            packed = self._zstd.compress(plain)
            if self._pays.packed(size, len(packed), time.perf_counter() - began):
                return memoryview(HEADER.pack(ZSTD, len(packed), size) + packed)
        HEADER.pack_into(self._buffer, 0, RAW, size, size)
        return self._view[: HEADER.size + size]

    @staticmethod
    def end() -> memoryview:
        """The last chunk."""
        return memoryview(HEADER.pack(END, 0, 0))


class Unpacker:
    """Makes plain bytes of chunks that come in pieces; nothing of a chunk is believed before it is checked.

    Parameters
    ----------
    zstd : bool
        Whether compressed chunks are taken.

    Attributes
    ----------
    ended : bool
        The end was said.
    """

    def __init__(self, *, zstd: bool) -> None:
        self.ended = False
        self._header = bytearray()
        # Of the chunk under way: what is missing of it, and what has come of a compressed one.
        self._left = 0
        self._packed = bytearray()
        self._plain = 0
        self._zstd: Any = None
        self._library: Any = None
        if zstd:
            import zstandard

            self._library = zstandard
            self._zstd = zstandard.ZstdDecompressor(max_window_size=CHUNK)

    def feed(self, data: memoryview) -> list[memoryview]:
        """The plain bytes in a piece; they may lie in the piece itself.

        Raises
        ------
        ProtocolError
            If it can be no chunk.
        """
        plain: list[memoryview] = []
        while data:
            if self.ended:
                raise ProtocolError("chunk", "comes after the end")
            if not self._left:
                take = HEADER.size - len(self._header)
                self._header += data[:take]
                data = data[take:]
                if len(self._header) == HEADER.size:
                    self._begin()
                continue
            piece, data = data[: self._left], data[self._left :]
            self._left -= len(piece)
            if not self._plain:
                plain.append(piece)
                continue
            self._packed += piece
            if not self._left:
                plain.append(memoryview(self._unpack()))
        return plain

    def _begin(self) -> None:
        kind, size, plain = HEADER.unpack(self._header)
        if any(self._header[1:4]):
            raise ProtocolError("chunk", "has bits set that mean nothing")
        if kind == END and size == plain == 0:
            self.ended = True
        elif kind == RAW and 0 < size == plain <= CHUNK:
            self._plain = 0
        elif kind == ZSTD and 0 < size < plain <= CHUNK and self._zstd is not None:
            self._plain = plain
        else:
            raise ProtocolError("chunk", f"of kind {kind}, {size} bytes for {plain}")
        self._left = size
        self._header.clear()

    def _unpack(self) -> bytes:
        packed, plain = bytes(self._packed), self._plain
        self._packed.clear()
        try:
            # Checked first: the library takes memory for what the frame says of itself.
            if self._library.frame_content_size(packed) != plain:
                raise ProtocolError("chunk", f"does not unpack to {plain} bytes")
            unpacked: bytes = self._zstd.decompress(packed, max_output_size=plain, allow_extra_data=False)
        except self._library.ZstdError as error:
            raise ProtocolError("chunk", f"cannot be unpacked: {error}") from None
        return unpacked
