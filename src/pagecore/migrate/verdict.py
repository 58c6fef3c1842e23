"""The last words of a migration: each side hears from the other what it found, and both know how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pagecore.errors import ProtocolError
from pagecore.migrate.link import Link
from pagecore.wire import FrameType, decode_report, encode_report

__all__ = ["OF_DESTINATION", "OF_SOURCE", "hear", "tell"]

# What each side found, and of what type each value is.
OF_SOURCE: Final = {
    "rounds": int,
    "pages_sent": int,
    "pages_urgent": int,
    "pages_zero": int,
    "wire_bytes": int,
    "owed": int,
    "hinted": int,
    "downtime": float,
    "total_time": float,
    "audit_pages": int,
    "audit_wrong": int,
    "self_check_errors": int,
}
OF_DESTINATION: Final = {"right": int, "wrong": int, "free": int, "exact": bool, "verification": str}


def tell(link: Link, found: Mapping[str, Any], names: Mapping[str, type]) -> None:
    """Send the peer what was found here.

    Raises
    ------
    PeerGoneError
    """
    link.send(FrameType.COMPLETE, encode_report({name: found[name] for name in names}))


def hear(link: Link, names: Mapping[str, type]) -> dict[str, Any]:
    """Wait for what the peer found; a peer that is not done yet says so with empty reports.

    All pages have arrived by now: a link that breaks here harms nobody.

    Raises
    ------
    PagecoreError
        If the link breaks, or the report cannot be right.
    """
    report: dict[str, Any] = {}
    while not report:
        _, payload = link.expect(FrameType.COMPLETE)
        report = decode_report(payload)
    for name, kind in names.items():
        value = report.get(name)
        if type(value) is not kind:
            raise ProtocolError(name, f"{value!r} is of the wrong type")
    return {name: report[name] for name in names}
