"""Reference controllers: a whole migration, built from public names alone."""

from __future__ import annotations

from pagecore.migrate.address import Terms, parse_address
from pagecore.migrate.coordinator import Migration
from pagecore.migrate.options import Options, format_size, parse_size
from pagecore.migrate.outcome import Outcome
from pagecore.migrate.roles import Receive, Send

__all__ = ["Migration", "Options", "Outcome", "Receive", "Send", "Terms", "format_size", "parse_address", "parse_size"]
