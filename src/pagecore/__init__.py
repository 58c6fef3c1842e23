"""pagecore: page bitmaps, free-page hints and userfaultfd placement for memory migration."""

from __future__ import annotations

import logging

from pagecore._bitmap import Bitmap
from pagecore._page_state import PageState
from pagecore._placement import PlacementLoop
from pagecore._uffd import PlaceResult, Region, Userfaultfd
from pagecore._uffd_types import Event, EventKind, FaultFlag, Feature
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
from pagecore.placement_stats import LatencyHistogram, PlacementStats

__all__ = [
    "Bitmap",
    "BusyError",
    "ClosedError",
    "Event",
    "EventKind",
    "FaultFlag",
    "Feature",
    "LatencyHistogram",
    "PageState",
    "PagecoreError",
    "PeerGoneError",
    "PlaceResult",
    "PlacementLoop",
    "PlacementStats",
    "ProtocolError",
    "Region",
    "SourceError",
    "UffdError",
    "UnsupportedError",
    "Userfaultfd",
]

__version__ = "0.1.0"

logging.getLogger("pagecore").addHandler(logging.NullHandler())
