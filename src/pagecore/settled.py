"""The checksum that a report of settled pages travels with (design rules S9 and W3)."""

from __future__ import annotations

import struct
import zlib
from typing import Final

from pagecore._bitmap import Bitmap

__all__ = ["settled_checksum"]

_HEAD: Final = struct.Struct("<QQQ")


def settled_checksum(settled: Bitmap, *, region: int = 0, generation: int = 0) -> int:
    """CRC-32 of a settled bitmap together with what it is of.

    The destination computes it over what it reports, the source hands it to ``PageTracker.reload``: a bitmap of
    another region, of another size or of an older connection fits no more than a damaged one.

    Parameters
    ----------
    settled : Bitmap
    region, generation : int
        The id of the region, and the generation of the connection it is reported on.

    Returns
    -------
    int
        32 bits.
    """
    head = _HEAD.pack(region, generation, settled.size)
    return zlib.crc32(settled.to_bytes(), zlib.crc32(head))
