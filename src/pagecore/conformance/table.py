"""The table, in its order."""

from __future__ import annotations

from typing import Final

from pagecore.conformance import discard_rows, fault_rows, handshake_rows, life_rows
from pagecore.conformance.rows import DECLARED, Row

__all__ = ["ROWS"]

ROWS: Final[dict[str, Row]] = {
    name: row
    for module in (handshake_rows, fault_rows, discard_rows, life_rows)
    for name, row in DECLARED.items()
    if row.body.__module__ == module.__name__
}
