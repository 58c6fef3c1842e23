"""The last words of a migration: each side hears from the other what it found, and both know how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pagecore.errors import PagecoreError, ProtocolError
from pagecore.migrate.link import Link
from pagecore.migrate.progress import Reporter
from pagecore.wire import FrameType, decode_report, encode_report

__all__ = ["OF_DESTINATION", "OF_SOURCE", "VERDICT_TIMEOUT", "hear", "tell"]

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
# The guest runs on for a while over there, and then all of its memory is compared.
VERDICT_TIMEOUT: Final = 60.0
OF_DESTINATION: Final = {"right": int, "wrong": int, "free": int, "exact": bool, "verification": str}


def tell(link: Link, found: Mapping[str, Any], names: Mapping[str, type]) -> None:
    """Send the peer what was found here.

    Raises
    ------
    PeerGoneError
    """
    link.send(FrameType.COMPLETE, encode_report({name: found[name] for name in names}))


def hear(link: Link, reporter: Reporter, names: Mapping[str, type], timeout: float) -> None:
    """Wait for what the peer found, and report it as the event ``peer``; with the error where it does not come.

    All pages have arrived by now: a link that breaks here harms nobody.
    """
    link.control.patience = timeout
    try:
        _, payload = link.expect(FrameType.COMPLETE)
        report = decode_report(payload)
        found: dict[str, Any] = {}
        for name, kind in names.items():
            value = found[name] = report.get(name)
            if type(value) is not kind:
                raise ProtocolError(name, f"{value!r} is of the wrong type")
    except (PagecoreError, OSError) as error:
        reporter.event("peer", error=str(error))
    else:
        reporter.event("peer", result=found)
