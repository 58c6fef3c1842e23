"""Shims before the C library, in processes that tests start."""

from __future__ import annotations

import os
from pathlib import Path


def preload(shim: str | Path) -> str:
    """LD_PRELOAD with a shim behind what stands in it already: the runtime of a sanitizer has to come first."""
    return " ".join([*os.environ.get("LD_PRELOAD", "").split(), str(shim)])
