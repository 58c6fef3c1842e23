"""Benchmarks that run from the installed package: what ``pagecore bench`` measures."""

from __future__ import annotations

from pagecore.bench.hints import HintsReport, measure_hints

__all__ = ["HintsReport", "measure_hints"]
