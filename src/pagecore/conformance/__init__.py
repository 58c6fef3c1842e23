"""What a userfaultfd page-fault handler must do, as a table that runs against any of them."""

from __future__ import annotations

from pagecore.conformance.rows import Row
from pagecore.conformance.snapshot import make_snapshot
from pagecore.conformance.suite import Verdict, run
from pagecore.conformance.table import ROWS

__all__ = ["ROWS", "Row", "Verdict", "make_snapshot", "run"]
