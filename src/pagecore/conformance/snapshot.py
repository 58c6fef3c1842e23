"""The snapshot that both sides know: every page of it follows from its number."""

from __future__ import annotations

import os
from typing import Final

import numpy as np

__all__ = ["HOLE", "NPAGES", "PAGE", "Snapshot", "make_snapshot"]

PAGE: Final = 4096
NPAGES: Final = 1024
# Pages (first, count) that are a hole of the file: they read as zeros, and every other byte pair of the file does not.
HOLE: Final = (256, 64)


def _content() -> bytes:
    words = np.arange(NPAGES * PAGE // 8, dtype=np.uint64)
    # The finaliser of splitmix64: no two pages are alike, and a page in a wrong place is seen.
    with np.errstate(over="ignore"):
        words = (words + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        words ^= words >> np.uint64(27)
        words *= np.uint64(0x94D049BB133111EB)
        words ^= words >> np.uint64(31)
    words |= np.uint64(1)
    words[HOLE[0] * PAGE // 8 : (HOLE[0] + HOLE[1]) * PAGE // 8] = 0
    return words.astype("<u8").tobytes()


def make_snapshot(path: str | os.PathLike[str]) -> int:
    """Write the snapshot, or put it right again.

    Parameters
    ----------
    path : path
        The file; what it held is replaced, in place, so that whoever has it open sees the same file.

    Returns
    -------
    int
        Its length in bytes.
    """
    content = _content()
    end = (HOLE[0] + HOLE[1]) * PAGE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.ftruncate(descriptor, HOLE[0] * PAGE)
        os.ftruncate(descriptor, len(content))
        _write(descriptor, content[: HOLE[0] * PAGE], 0)
        _write(descriptor, content[end:], end)
    finally:
        os.close(descriptor)
    return len(content)


def _write(descriptor: int, data: bytes, position: int) -> None:
    while data:
        done = os.pwrite(descriptor, data, position)
        data, position = data[done:], position + done


class Snapshot:
    """The content of a snapshot file, checked.

    Parameters
    ----------
    path : path
        What `make_snapshot` has written.

    Raises
    ------
    ValueError
        It holds something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with open(path, "rb") as file:
            self.content = file.read(NPAGES * PAGE + 1)
        if self.content != _content():
            raise ValueError(f"{self.path} is not the snapshot of this suite: write it with --make-snapshot")

    def page(self, number: int, count: int = 1) -> bytes:
        """The bytes of `count` pages."""
        return self.content[number * PAGE : (number + count) * PAGE]
