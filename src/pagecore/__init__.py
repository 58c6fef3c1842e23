"""pagecore: page bitmaps, free-page hints and userfaultfd placement for memory migration.

At the source ``PageTracker`` says what is owed and ``HintSession`` takes free pages off that debt. At the destination
``Userfaultfd`` registers memory, and ``PlacementLoop`` serves its faults, without the GIL, from a source of
``pagecore.page_source``. ``Bitmap`` is what both keep their books in. Races are results, misuse and loss are exceptions
(``PagecoreError``); nothing that failed ever reads as zeros.

Other modules: ``dirty_log``, ``dirty_rate``, ``page_source``, ``probe``, ``wire``, ``migrate`` (reference controllers),
``aio``, ``metrics``, ``files``, ``firecracker`` and ``snapshot_server``, ``conformance``, ``testing``, ``bench``.
"""

from __future__ import annotations

import logging

from pagecore._bitmap import Bitmap
from pagecore._discard_pages import discard_pages
from pagecore._move import Mover
from pagecore._page_state import PageState
from pagecore._place_result import PlaceResult
from pagecore._placement import PlacementLoop
from pagecore._region import Region
from pagecore._tracker import Answer, AnswerKind, PageCounts, PageTracker, RegionRuns
from pagecore._turns import give_way, let_by
from pagecore._uffd import Userfaultfd
from pagecore._uffd_types import Event, EventKind, FaultFlag, Feature, MemoryKind, RegisterMode, Waiting
from pagecore._watchdog import StuckWaiter
from pagecore._zero_pages import split_zero
from pagecore.background_snapshot import BackgroundSnapshot, SnapshotProgress
from pagecore.convergence import Advice, Convergence, ConvergenceMeter
from pagecore.dirty_log import (
    DirtyLog,
    KvmDirtyLog,
    KvmDirtyRing,
    KvmManualDirtyLog,
    KvmRingDirtyLog,
    MemoryDirtyLog,
    PagemapDirtyLog,
    VhostLog,
    WriteProtectDirtyLog,
)
from pagecore.errors import (
    BusyError,
    ClosedError,
    OutOfMemoryError,
    PagecoreError,
    PeerGoneError,
    ProtocolError,
    SourceError,
    UffdError,
    UnreadableError,
    UnsupportedError,
)
from pagecore.hints import Command, HintSession, HintState, ResumedHintSession
from pagecore.placement_stats import LatencyHistogram, PlacementStats
from pagecore.saved_bitmap import SavedBitmap
from pagecore.settled import settled_checksum
from pagecore.tracked_region import TrackedRegion
from pagecore.working_set import WorkingSet

__all__ = [
    "Advice",
    "Answer",
    "AnswerKind",
    "BackgroundSnapshot",
    "Bitmap",
    "BusyError",
    "ClosedError",
    "Command",
    "Convergence",
    "ConvergenceMeter",
    "DirtyLog",
    "Event",
    "EventKind",
    "FaultFlag",
    "Feature",
    "HintSession",
    "HintState",
    "KvmDirtyLog",
    "KvmDirtyRing",
    "KvmManualDirtyLog",
    "KvmRingDirtyLog",
    "LatencyHistogram",
    "MemoryDirtyLog",
    "MemoryKind",
    "Mover",
    "OutOfMemoryError",
    "PageCounts",
    "PageState",
    "PageTracker",
    "PagecoreError",
    "PagemapDirtyLog",
    "PeerGoneError",
    "PlaceResult",
    "PlacementLoop",
    "PlacementStats",
    "ProtocolError",
    "Region",
    "RegionRuns",
    "RegisterMode",
    "ResumedHintSession",
    "SavedBitmap",
    "SnapshotProgress",
    "SourceError",
    "StuckWaiter",
    "TrackedRegion",
    "UffdError",
    "UnreadableError",
    "UnsupportedError",
    "Userfaultfd",
    "VhostLog",
    "Waiting",
    "WorkingSet",
    "WriteProtectDirtyLog",
    "discard_pages",
    "give_way",
    "let_by",
    "settled_checksum",
    "split_zero",
]

__version__ = "0.1.0"

logging.getLogger("pagecore").addHandler(logging.NullHandler())
