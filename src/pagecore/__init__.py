"""pagecore: page bitmaps, free-page hints and userfaultfd placement for memory migration."""

from __future__ import annotations

import logging

from pagecore._bitmap import Bitmap
from pagecore.errors import (
    BusyError,
    ClosedError,
    PagecoreError,
    PeerGoneError,
    ProtocolError,
    SourceError,
    UffdError,
    UnsupportedError,
)

__all__ = [
    "Bitmap",
    "BusyError",
    "ClosedError",
    "PagecoreError",
    "PeerGoneError",
    "ProtocolError",
    "SourceError",
    "UffdError",
    "UnsupportedError",
]

__version__ = "0.1.0"

logging.getLogger("pagecore").addHandler(logging.NullHandler())
