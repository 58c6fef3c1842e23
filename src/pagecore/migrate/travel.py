"""How each page of a guest travelled: a class a page, as a short text of run lengths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pagecore import Bitmap, PageState
from pagecore.errors import ProtocolError
from pagecore.testing import PlacementAudit

__all__ = ["CLASSES", "MAX_CELLS", "PIECE", "decode_map", "encode_map", "page_classes"]

Classes = npt.NDArray[np.uint8]

# The letter of each class, its name, and what it means. Their order is that of legends.
CLASSES: Final = {
    "p": ("precopied", "sent before the switch, and still valid then"),
    "b": ("bulk", "sent after the switch, before anybody asked for it"),
    "d": ("demanded", "asked for by a fault after the switch"),
    "z": ("zero", "all zeros: sent as a mark"),
    "h": ("hinted", "free at the switch: never sent, filled where it is touched"),
    "r": ("discarded", "given back by the guest after the switch"),
    "m": ("missing", "did not arrive"),
}
_LETTERS: Final = "".join(CLASSES)
_RUN: Final = re.compile(r"([1-9][0-9]{0,8})?([a-z])")
# A larger guest is sampled: one page of every 2, 4, 8 ...
MAX_CELLS: Final = 1 << 18
MAX_PAGES: Final = 1 << 40
# Pages looked at together: a byte each, several times over.
PIECE: Final = 1 << 16
# Runs written together.
PART: Final = 1 << 12


def page_classes(
    state: PageState, zero: Bitmap | None = None, audit: PlacementAudit | None = None
) -> Iterator[Classes]:
    """The class of each page, as an index into `CLASSES`, some pages at a time.

    Parameters
    ----------
    state : PageState
    zero : Bitmap, optional
        The pages that were released at the switch because they were zero. By default every released page was.
    audit : PlacementAudit, optional
        What was placed after the switch; made with ``state=state``, so that it knows what had been asked for.

    Yields
    ------
    numpy.ndarray
        uint8, one for each page; of `PIECE` pages at the most.
    """
    for first in range(0, state.size, PIECE):
        yield _classes(_Piece(first, min(PIECE, state.size - first)), state, zero, audit)


def _classes(piece: _Piece, state: PageState, zero: Bitmap | None, audit: PlacementAudit | None) -> Classes:
    released = piece.of(state.released)
    zeros = piece.of(state.zero) | (released if zero is None else piece.of(zero))
    hinted = piece.of(state.hinted)
    settled = (piece.of(state.received) | released | zeros | hinted) & ~piece.of(state.excluded)
    classes = np.full(piece.count, _LETTERS.index("m"), np.uint8)
    classes[settled] = _LETTERS.index("p")
    if audit is not None:
        filled = piece.of(audit.zeros)
        classes[piece.of(audit.content) | filled] = _LETTERS.index("b")
        zeros |= filled
    classes[zeros & settled] = _LETTERS.index("z")
    classes[hinted] = _LETTERS.index("h")
    if audit is not None:
        classes[piece.of(audit.requested)] = _LETTERS.index("d")
    if zero is not None:
        classes[released & ~piece.of(zero)] = _LETTERS.index("r")
    return classes


class _Piece(NamedTuple):
    """Some pages of a region."""

    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody wants here

    def of(self, bitmap: Bitmap) -> npt.NDArray[np.bool_]:
        """Their bits."""
        part = Bitmap(self.count)
        part.copy_range(bitmap, self.first, 0, self.count)
        words = np.frombuffer(part.to_bytes(), np.uint8)
        return np.unpackbits(words, count=self.count, bitorder="little").view(np.bool_)


def encode_map(pieces: Iterable[Classes]) -> dict[str, Any]:
    """The classes as plain values.

    Parameters
    ----------
    pieces : iterable of numpy.ndarray
        As `page_classes` makes them.

    Returns
    -------
    dict
        ``pages``; ``counts``, from the name of a class to its pages; ``unit``, and ``runs``: the class of every unit-th
        page, as run length and letter of `CLASSES`, without the length where it is 1 (``4096pz2h``).
    """
    cells = np.empty(0, np.uint8)
    found = np.zeros(len(CLASSES), np.int64)
    pages, unit = 0, 1
    for piece in pieces:
        found += np.bincount(piece, minlength=len(CLASSES))
        cells = np.concatenate((cells, piece[-pages % unit :: unit]))
        pages += len(piece)
        while len(cells) > MAX_CELLS:
            cells, unit = cells[::2], 2 * unit
    edges = np.flatnonzero(np.diff(cells)) + 1
    starts = np.concatenate(([0], edges)) if len(cells) else edges
    lengths = np.diff(np.concatenate((starts, [len(cells)])))
    kinds = cells[starts]
    return {
        "pages": pages,
        "counts": {name: count for (name, _), count in zip(CLASSES.values(), found.tolist(), strict=True)},
        "unit": unit,
        # In parts: an object a run, if only for a moment, would be more than all the rest.
        "runs": "".join(_text(lengths[at : at + PART], kinds[at : at + PART]) for at in range(0, len(kinds), PART)),
    }


def _text(lengths: npt.NDArray[np.int64], kinds: Classes) -> str:
    runs = zip(lengths.tolist(), kinds.tolist(), strict=True)
    return "".join(f"{length if length > 1 else ''}{_LETTERS[kind]}" for length, kind in runs)


def decode_map(given: Any) -> Classes:
    """The classes of the sampled pages of a map that `encode_map` made.

    Returns
    -------
    numpy.ndarray
        uint8, one for every unit-th page.

    Raises
    ------
    ProtocolError
        Naming the field. Memory is taken for `MAX_CELLS` cells at the most.
    """
    if not isinstance(given, dict):
        raise ProtocolError("map", "is no object")
    pages, unit, runs, counts = (given.get(name) for name in ("pages", "unit", "runs", "counts"))
    if type(pages) is not int or not 0 <= pages <= MAX_PAGES:
        raise ProtocolError("map pages", f"{pages!r:.40} is outside [0, {MAX_PAGES}]")
    if type(unit) is not int or unit < 1 or unit & (unit - 1) or unit > MAX_PAGES:
        raise ProtocolError("map unit", f"{unit!r:.40} is not a power of two")
    cells = -(-pages // unit)
    if cells > MAX_CELLS:
        raise ProtocolError("map unit", f"{unit} makes {cells} cells; the most are {MAX_CELLS}")
    names = [name for name, _ in CLASSES.values()]
    if not isinstance(counts, dict) or sorted(counts) != sorted(names):
        raise ProtocolError("map counts", f"are not of {', '.join(names)}")
    if any(type(count) is not int or count < 0 for count in counts.values()) or sum(counts.values()) != pages:
        raise ProtocolError("map counts", f"do not make {pages} pages")
    if not isinstance(runs, str) or len(runs) > MAX_CELLS:
        raise ProtocolError("map runs", "are no text of bounded length")
    classes = np.empty(cells, np.uint8)
    at = position = 0
    while position < len(runs):
        found = _RUN.match(runs, position)
        if found is None or found[2] not in _LETTERS:
            raise ProtocolError("map runs", f"{runs[position : position + 12]!r} is no run")
        length = int(found[1] or 1)
        # Past the end nothing is written, and then the sum is wrong.
        classes[at : at + length] = _LETTERS.index(found[2])
        at += length
        position = found.end()
    if at != cells:
        raise ProtocolError("map runs", f"end at cell {at} of {cells}")
    return classes
