"""The report of a run in a file: what became of a migration, its course and its map, versioned and checksummed."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

from pagecore.errors import ProtocolError
from pagecore.files import read_bounded, write_whole
from pagecore.migrate.outcome import Outcome
from pagecore.migrate.series import MAX_MARKS, MAX_SAMPLES
from pagecore.migrate.travel import MAX_PAGES, decode_map

__all__ = ["load_report", "parse_report", "save_report"]

FORMAT: Final = "pagecore run report"
VERSION: Final = 1
MAX_BYTES: Final = 16 << 20
# What a report may have beyond what is checked by name: plain values, this deep.
MAX_DEPTH: Final = 8
MAX_TEXT: Final = 4096
MAX_SECONDS: Final = 1e9
MAX_NUMBER: Final = 1 << 63

_SIDES: Final = {
    "source": ("at", "owed", "hinted", "bandwidth", "guest_writes"),
    "destination": ("at", "arrived", "guest_writes", "faults", "fault_p50_us", "fault_p99_us"),
}
_ROUND: Final = ("at", "round", "seconds", "newly_dirty", "sent", "remaining", "dirty_rate", "bandwidth")
# Whoever shows a report shows these; the others are shown by nobody.
# Whoever shows a report shows these; the others are shown by nobody. Where the first of a line is, all of it must be.
_SOURCE: Final = (
    ("rounds", "pages_sent", "pages_zero", "hinted"),
    ("downtime", "total_time"),
    ("audit_pages", "audit_wrong"),
)
_PLACEMENT: Final = ("requested", "already_sent", "duplicates")
_LATENCY: Final = ("count", "p50_us", "p99_us", "max_us")


def save_report(outcome: Outcome, path: str | os.PathLike[str]) -> None:
    """Write the report of a run, whole or not at all.

    Parameters
    ----------
    outcome : Outcome
    path : path-like
        Is replaced if it exists.

    Raises
    ------
    OSError
        It could not be written; the old file is as it was.

    Notes
    -----
    The file is one JSON object: ``format`` ("pagecore run report"), ``version`` (1), ``checksum`` and ``report``. The
    checksum is the CRC-32 of the report as JSON in ASCII with sorted keys and no spaces.
    """
    # As it will be read: JSON knows no other keys than texts.
    report = json.loads(json.dumps(outcome.to_json(), allow_nan=False))
    envelope = {"format": FORMAT, "version": VERSION, "checksum": _checksum(report), "report": report}
    write_whole(path, json.dumps(envelope).encode() + b"\n")


def load_report(path: str | os.PathLike[str]) -> Outcome:
    """Read a file that `save_report` wrote.

    Raises
    ------
    ProtocolError, OSError
        As `parse_report`; the file could not be read.
    """
    return parse_report(read_bounded(path, MAX_BYTES))


def parse_report(data: bytes) -> Outcome:
    """Parse a file's content, and check whatever is shown of it.

    Parameters
    ----------
    data : bytes
        All of it.

    Returns
    -------
    Outcome

    Raises
    ------
    ProtocolError
        It is none; names the field that is wrong.
    """
    try:
        envelope = json.loads(data, parse_constant=_no_constant)
    # A text that is nested too deep for the parser is none of ours either.
    except (ValueError, RecursionError) as error:
        raise ProtocolError("json", f"{error!s:.200}") from None
    if not isinstance(envelope, dict) or envelope.get("format") != FORMAT:
        raise ProtocolError("format", f"is not {FORMAT!r}")
    if envelope.get("version") != VERSION:
        raise ProtocolError("version", f"{envelope.get('version')!r:.40} is not {VERSION}")
    report = envelope.get("report")
    if not isinstance(report, dict):
        raise ProtocolError("report", "is no object")
    _plain(report, "report", MAX_DEPTH)
    found, said = _checksum(report), envelope.get("checksum")
    if found != said:
        raise ProtocolError("checksum", f"{said!r:.40} is not {found}: the file is damaged")
    return _outcome(report)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _checksum(report: Mapping[str, Any]) -> str:
    text = json.dumps(report, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x}"


def _plain(value: Any, field: str, depth: int) -> None:
    """Refuse what is nested deep, and numbers beyond all bounds: whatever is left can be shown."""
    if isinstance(value, dict | list):
        if not depth:
            raise ProtocolError(field[:80], f"is nested more than {MAX_DEPTH} deep")
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            _plain(inner, f"{field}.{key}", depth - 1)
    elif isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:
        raise ProtocolError(field[:80], f"is beyond {MAX_NUMBER}")


def _outcome(report: dict[str, Any]) -> Outcome:
    rest = dict(report)
    verified = _take(rest, "verified", lambda value: type(value) is bool)
    code = _take(rest, "exit_code", lambda value: type(value) is int and 0 <= value <= 255)
    guest_at = _take(rest, "guest_at", lambda value: value in ("source", "destination", "gone", "unknown", "nowhere"))
    message = _take(rest, "message", lambda value: isinstance(value, str) and len(value) <= MAX_TEXT)
    pages = _get(rest, "pages", lambda value: type(value) is int and 0 <= value <= MAX_PAGES)
    options = _object(rest, "options")
    _get(options, "size", lambda value: type(value) is int and value >= 0, "options.size")
    guest = _object(rest, "guest", {})
    for name in guest:
        _get(guest, name, lambda value: isinstance(value, str) and len(value) <= MAX_TEXT, f"guest.{name}")
    if guest and not {"kind", "reason"} <= set(guest):
        raise ProtocolError("guest", "has no kind, or no reason")
    source = _object(rest, "source")
    for names in _SOURCE:
        if names[0] in source:
            _numbers(source, "source", names)
    if "throughput" in rest:
        _get(rest, "throughput", _is_number)
    _check_placement(_object(rest, "destination"))
    _check_course(rest)
    for name in ("map", "switch"):
        # There was none is another thing than nothing being said.
        if name not in rest:
            raise ProtocolError(name, "is missing")
    if rest["map"] is not None:
        decode_map(rest["map"])
        if rest["map"]["pages"] != pages:
            raise ProtocolError("map pages", f"{rest['map']['pages']} are not the guest's {pages}")
    return Outcome(verified, code, guest_at, message, rest)


def _check_placement(destination: dict[str, Any]) -> None:
    if destination.get("placement") is None:
        return
    placement = _object(destination, "placement", None, "destination.placement")
    _numbers(placement, "destination.placement", _PLACEMENT)
    latency = _object(placement, "latency", None, "destination.placement.latency")
    for name in ("owed", "hinted"):
        field = f"destination.placement.latency.{name}"
        _numbers(_object(latency, name, None, field), field, _LATENCY)


def _check_course(report: dict[str, Any]) -> None:
    """Phases, rounds, the switch, and the samples of both sides."""
    for at, phase in enumerate(_list(report, "phases", MAX_MARKS)):
        field = f"phases.{at}"
        if not isinstance(phase, dict):
            raise ProtocolError(field, "is no object")
        _get(phase, "phase", lambda value: isinstance(value, str) and len(value) <= 40, f"{field}.phase")
        _numbers(phase, field, ("round", "at"))
    for at, figures in enumerate(_list(report, "rounds", MAX_MARKS)):
        if not isinstance(figures, dict):
            raise ProtocolError(f"rounds.{at}", "is no object")
        _numbers(figures, f"rounds.{at}", _ROUND)
        if not _is_number(figures.get("expected_downtime", 0), null=True):
            raise ProtocolError(f"rounds.{at}.expected_downtime", "is no number")
    if report.get("switch") is not None:
        switch = _list(report, "switch", 2)
        if len(switch) != 2 or not all(_is_time(value) for value in switch) or switch[0] > switch[1]:
            raise ProtocolError("switch", "is not the time of a pause and the time of its end")
    for name in ("outages", "pauses"):
        for at, span in enumerate(_list(report, name, MAX_MARKS)):
            right = isinstance(span, list) and len(span) == 2 and _is_time(span[0])
            if not right or not (span[1] is None or (_is_time(span[1]) and span[1] >= span[0])):
                raise ProtocolError(f"{name}.{at}", "is not the time when it began and the time of its end")
    series = _object(report, "series")
    for side, names in _SIDES.items():
        columns = _object(series, side, None, f"series.{side}")
        if sorted(columns) != sorted(names):
            raise ProtocolError(f"series.{side}", f"has not the columns {', '.join(names)}")
        length = len(_list(columns, "at", MAX_SAMPLES + 1, f"series.{side}.at"))
        for name in names:
            field = f"series.{side}.{name}"
            column = _list(columns, name, length, field)
            if len(column) != length:
                raise ProtocolError(field, f"has {len(column)} entries; the times have {length}")
            if name != "at" and not all(_is_number(value, null=True) for value in column):
                raise ProtocolError(field, "has an entry that is no number")
        if not all(map(_is_time, columns["at"])) or columns["at"] != sorted(columns["at"]):
            raise ProtocolError(f"series.{side}.at", "are not times in their order")


def _is_number(value: Any, null: bool = False) -> bool:
    return (null and value is None) or (type(value) in (int, float) and 0 <= value < math.inf)


def _is_time(value: Any) -> bool:
    """Before precopy it is negative."""
    return type(value) in (int, float) and abs(value) <= MAX_SECONDS


def _numbers(given: dict[str, Any], field: str, names: tuple[str, ...]) -> None:
    for name in names:
        if not (_is_time if name == "at" else _is_number)(given.get(name)):
            raise ProtocolError(f"{field}.{name}", f"{given.get(name)!r:.40} is no number")


def _get(given: dict[str, Any], name: str, right: Callable[[Any], bool], field: str = "") -> Any:
    value = given.get(name)
    if not right(value):
        raise ProtocolError((field or name)[:80], f"{value!r:.40} cannot be right")
    return value


def _take(given: dict[str, Any], name: str, right: Callable[[Any], bool]) -> Any:
    value = _get(given, name, right)
    del given[name]
    return value


def _object(given: dict[str, Any], name: str, default: Any = None, field: str = "") -> dict[str, Any]:
    value = given.get(name, default)
    if not isinstance(value, dict):
        raise ProtocolError(field or name, "is no object")
    return value


def _list(given: dict[str, Any], name: str, longest: int, field: str = "") -> list[Any]:
    value = given.get(name)
    if not isinstance(value, list) or len(value) > longest:
        raise ProtocolError(field or name, f"is no list of at most {longest}")
    return value
