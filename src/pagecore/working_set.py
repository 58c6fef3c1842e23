"""WorkingSet: which pages were touched first, as runs in a small file."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pagecore.errors import ProtocolError
from pagecore.files import read_bounded, write_whole

__all__ = ["WorkingSet"]

MAGIC = b"PGWS"
VERSION = 1
# magic, version, reserved, page size, runs, crc32 of the header before it and of the runs
_HEADER = struct.Struct("<4sHHQQI")
_CHECKED = _HEADER.size - 4
_RUN = np.dtype([("region", "<u4"), ("count", "<u4"), ("first", "<u8")])
MAX_RUNS = 1 << 24
MAX_PAGE = 1 << 52


class WorkingSet:
    """WorkingSet(runs, page_size=4096)

    Runs of pages in the order in which they were first touched.

    Parameters
    ----------
    runs : array_like
        Integers, shape (n, 3): region id, first page, page count.
    page_size : int
        Bytes.

    Raises
    ------
    ValueError
        Another shape, an empty run, or a number outside its bounds.

    Notes
    -----
    The file is little-endian: 28 bytes ``<4sHHQQI`` (magic PGWS, version 1, 0, page size, runs, checksum), then 16
    bytes ``<IIQ`` for each run (region id, page count, first page). The checksum is the CRC-32 of all the rest.
    """

    def __init__(self, runs: ArrayLike, page_size: int = 4096) -> None:
        array = np.array(runs, dtype=np.int64).reshape(-1, 3) if np.size(runs) == 0 else np.array(runs, dtype=np.int64)
        if array.ndim != 2 or array.shape[1] != 3:
            raise ValueError(f"runs have the shape {array.shape}, not (n, 3)")
        if page_size <= 0 or page_size & (page_size - 1):
            raise ValueError(f"page size {page_size} is not a power of two")
        if len(array) > MAX_RUNS:
            raise ValueError(f"{len(array)} runs are more than {MAX_RUNS}")
        regions, firsts, counts = array[:, 0], array[:, 1], array[:, 2]
        for name, values, low, high in (
            ("region id", regions, 0, 1 << 16),
            ("first page", firsts, 0, MAX_PAGE),
            ("page count", counts, 1, 1 << 32),
        ):
            wrong = np.flatnonzero((values < low) | (values >= high))
            if len(wrong):
                raise ValueError(f"run {wrong[0]}: {name} {values[wrong[0]]} is outside [{low}, {high})")
        array.setflags(write=False)
        self._runs = array
        self._page_size = page_size

    @property
    def runs(self) -> NDArray[np.int64]:
        """int64, shape (n, 3), read-only: region id, first page, page count."""
        return self._runs

    @property
    def page_size(self) -> int:
        """Bytes of a page."""
        return self._page_size

    @property
    def pages(self) -> int:
        """Pages of all runs."""
        return int(self._runs[:, 2].sum())

    def __len__(self) -> int:
        return len(self._runs)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WorkingSet):
            return NotImplemented
        return self._page_size == other._page_size and np.array_equal(self._runs, other._runs)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<WorkingSet of {self.pages} pages of {self._page_size} bytes in {len(self)} runs>"

    @classmethod
    def from_touches(cls, touches: ArrayLike, region_ids: Sequence[int], page_size: int = 4096) -> WorkingSet:
        """Make one from single pages.

        Parameters
        ----------
        touches : array_like
            int64, shape (n, 2): an index into `region_ids`, and a page; in the order of the touches.
        region_ids : sequence of int
            The ids of the regions.
        page_size : int
            Bytes.

        Returns
        -------
        WorkingSet
            Neighbours are one run, which stands where the first of its pages stood.
        """
        runs: list[list[int]] = []
        starts: dict[tuple[int, int], list[int]] = {}
        ends: dict[tuple[int, int], list[int]] = {}
        for index, page in np.array(touches, dtype=np.int64).reshape(-1, 2).tolist():
            before = ends.pop((index, page), None)
            after = starts.pop((index, page + 1), None)
            if before is not None and after is not None:
                # The page joins two runs: the one that was touched earlier takes the other in, which is left empty.
                run, other = (before, after) if before[3] < after[3] else (after, before)
                run[1], run[2] = before[1], before[2] + 1 + after[2]
                other[2] = 0
            elif before is not None:
                run = before
                run[2] += 1
            elif after is not None:
                run = after
                run[1] -= 1
                run[2] += 1
            else:
                run = [index, page, 1, len(runs)]
                runs.append(run)
            starts[(index, run[1])] = run
            ends[(index, run[1] + run[2])] = run
        return cls([(region_ids[index], first, count) for index, first, count, _ in runs if count], page_size)

    def parts(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield (region id, int64 array of shape (n, 2)) for each stretch of runs of one region, in order."""
        if not len(self._runs):
            return
        edges = np.flatnonzero(np.diff(self._runs[:, 0])) + 1
        for part in np.split(self._runs, edges):
            yield int(part[0, 0]), np.ascontiguousarray(part[:, 1:])

    def to_bytes(self) -> bytes:
        """The file's content."""
        records = np.empty(len(self._runs), _RUN)
        records["region"], records["first"], records["count"] = self._runs.T
        header = _HEADER.pack(MAGIC, VERSION, 0, self._page_size, len(records), 0)[:_CHECKED]
        body = records.tobytes()
        return header + zlib.crc32(body, zlib.crc32(header)).to_bytes(4, "little") + body

    @classmethod
    def from_bytes(cls, data: bytes) -> WorkingSet:
        """Parse a file's content.

        Parameters
        ----------
        data : bytes
            All of it.

        Returns
        -------
        WorkingSet

        Raises
        ------
        ProtocolError
            It is none; names the field that is wrong. Memory is taken for what is there alone, whatever the header
            says.
        """
        if len(data) < _HEADER.size:
            raise ProtocolError("length", f"{len(data)} bytes are fewer than the header's {_HEADER.size}")
        magic, version, reserved, page_size, runs, checksum = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise ProtocolError("magic", f"{magic!r} is not {MAGIC!r}: not a working set")
        if version != VERSION:
            raise ProtocolError("version", f"{version} is not {VERSION}")
        if reserved:
            raise ProtocolError("reserved", f"{reserved} is not 0")
        if runs > MAX_RUNS:
            raise ProtocolError("runs", f"{runs} are more than {MAX_RUNS}")
        if len(data) != _HEADER.size + runs * _RUN.itemsize:
            raise ProtocolError("runs", f"{runs} of {_RUN.itemsize} bytes do not make {len(data) - _HEADER.size} bytes")
        found = zlib.crc32(data[_HEADER.size :], zlib.crc32(data[:_CHECKED]))
        if found != checksum:
            raise ProtocolError("checksum", f"{found:#010x} is not {checksum:#010x}: the file is damaged")
        records = np.frombuffer(data, _RUN, runs, _HEADER.size)
        if runs and int(records["first"].max()) >= MAX_PAGE:
            raise ProtocolError("first", f"{int(records['first'].max())} is outside [0, {MAX_PAGE})")
        try:
            return cls(
                np.stack([records[name].astype(np.int64) for name in ("region", "first", "count")], 1), page_size
            )
        except ValueError as error:
            raise ProtocolError("run", str(error)) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all: whoever reads it meanwhile finds the old one.

        Parameters
        ----------
        path : path-like
            Is replaced if it exists.

        Raises
        ------
        OSError
            It could not be written; the old file is as it was.
        """
        write_whole(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WorkingSet:
        """Read a file that `save` wrote.

        Parameters
        ----------
        path : path-like
            The file.

        Returns
        -------
        WorkingSet

        Raises
        ------
        ProtocolError, OSError
            As `from_bytes`; the file could not be read.
        """
        return cls.from_bytes(read_bounded(path, _HEADER.size + MAX_RUNS * _RUN.itemsize))
