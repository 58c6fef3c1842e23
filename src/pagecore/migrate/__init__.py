"""Reference controllers: a whole migration, built from public names alone."""

from __future__ import annotations

from pagecore.migrate.coordinator import Migration
from pagecore.migrate.options import Options, format_size, parse_size
from pagecore.migrate.outcome import Outcome

__all__ = ["Migration", "Options", "Outcome", "format_size", "parse_size"]
