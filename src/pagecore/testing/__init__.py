"""Guests to move, and the means to tell whether they arrived: what the tests and ``pagecore migrate`` run."""

from __future__ import annotations

from pagecore.testing._audit import PlacementAudit, compare_placed
from pagecore.testing._verify import page_checksums
from pagecore.testing.config import GuestConfig
from pagecore.testing.guest import Guest, GuestStats
from pagecore.testing.opening import open_guest
from pagecore.testing.verify import Verification, verify_memory

__all__ = [
    "Guest",
    "GuestConfig",
    "GuestStats",
    "PlacementAudit",
    "Verification",
    "compare_placed",
    "open_guest",
    "page_checksums",
    "verify_memory",
]
