"""What a migration is asked to do: checked once, and handed to both processes as JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

from pagecore.wire import MAX_STREAMS

__all__ = ["DIRTY_LOGS", "PAGE_SIZE", "Options", "format_size", "parse_size"]

PAGE_SIZE: Final = 4096

_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)
_LARGEST: Final = _UNITS["T"]

MIN_SIZE: Final = 16 << 20
# Page tables of the guest map memory in blocks.
SIZE_STEP: Final = 2 << 20
# The largest guest that `testing.open_guest` makes.
MAX_SIZE: Final = 256 << 30
# With postcopy there is little to gain from more: what is left is pushed while the guest runs.
ROUNDS_BEFORE_POSTCOPY: Final = 1
# Without it every round must leave less than the one before, and that ends some time.
ROUNDS_WITHOUT_POSTCOPY: Final = 30

DIRTY_LOGS: Final = ("auto", "get", "clear", "ring", "pagemap", "marks")
_LOGS_OF: Final = {
    "auto": DIRTY_LOGS,
    "kvm": tuple(name for name in DIRTY_LOGS if name != "marks"),
    "process": ("auto", "pagemap", "marks"),
}


def parse_size(text: str) -> int:
    """Bytes of ``4K``, ``2M``, ``1G``, ``1.5G`` or a plain number; units are powers of 1024.

    Raises
    ------
    ValueError
        If the text is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write 4K, 2M, 1G or a number of bytes")
    number = float(match[1]) * _UNITS[match[2].upper()]
    if number > _LARGEST:
        raise ValueError(f"{text!r} is more than {format_size(_LARGEST)}")
    return int(number)


def format_size(size: float) -> str:
    """A size as a person writes it: ``256M``, ``1.5G``, ``812``."""
    for unit in ("T", "G", "M", "K"):
        if size >= _UNITS[unit]:
            text = f"{size / _UNITS[unit]:.1f}".removesuffix(".0")
            return f"{text}{unit}"
    return f"{size:.0f}"


@dataclass(frozen=True, slots=True)
class Options:
    """One migration on this machine.

    Attributes
    ----------
    size : int
        Guest memory in bytes; a multiple of 2 MiB, 16 MiB to 256 GiB.
    dirty_rate : int or None
        Bytes a second that the guest writes; None lets it write as fast as it can.
    free_share : float
        The part of its memory that the guest frees, in [0, 0.9].
    hints : bool
        The guest reports its free pages, and they are not sent.
    postcopy : bool
        The guest runs at the destination before all of its memory is there.
    precopy_rounds : int or None
        The most rounds before the switch, 0 for none; None: 1 with postcopy, 30 without.
    bandwidth : int or None
        Bytes a second of all bulk streams together; None is without a cap.
    downtime_limit : float
        Seconds; without postcopy the switch comes as soon as what is left fits in it.
    throttle : bool
        Without postcopy: slow the guest down where rounds do not leave less and less.
    seed : int
        Everything that the guest does follows from it.
    guest : str
        ``auto``, ``kvm`` or ``process``.
    dirty_log : str
        What records the writes of the guest. Of a KVM guest ``get`` (the dirty bitmap, re-armed as it is fetched),
        ``clear`` (re-armed apart: manual protect), ``ring`` or ``pagemap``; of a process guest ``marks`` (its threads
        report their writes) or ``pagemap``. ``auto`` is ``get`` and ``marks``.
    vcpus : int
        1 to 8.
    link : str
        ``unix`` or ``tcp`` (loopback).
    streams : int
        Bulk streams, 1 to 16, beside the control and the urgent one.
    emulate_qemu : bool
        The source forgets which pages were hinted, as QEMU does: requests for them go unanswered.
    duplicates : str
        What the destination does when a page comes twice after the switch: ``tolerant`` or ``strict``.
    settle_steps : int
        Steps that the guest makes at the destination before it stops for the verification; 0: as many as it
        takes to come by every page.
    timeout : float
        Seconds up to the switch, without pauses. After it no time is too long: to end then would lose the guest.
    stall_timeout : float
        Seconds without a byte from the peer before it counts as lost.
    reconnect_timeout : float
        Seconds that both sides try to find together again where the link was lost after the switch; 0: not at all.
    """

    size: int = 256 << 20
    dirty_rate: int | None = 128 << 20
    free_share: float = 0.5
    hints: bool = True
    postcopy: bool = True
    precopy_rounds: int | None = None
    bandwidth: int | None = None
    downtime_limit: float = 0.3
    throttle: bool = False
    seed: int = 1
    guest: Literal["auto", "kvm", "process"] = "auto"
    dirty_log: Literal["auto", "get", "clear", "ring", "pagemap", "marks"] = "auto"
    vcpus: int = 1
    link: Literal["unix", "tcp"] = "unix"
    streams: int = 2
    emulate_qemu: bool = False
    duplicates: Literal["tolerant", "strict"] = "tolerant"
    settle_steps: int = 0
    timeout: float = 300.0
    stall_timeout: float = 20.0
    reconnect_timeout: float = 30.0

    def __post_init__(self) -> None:
        """Refuse what cannot work, with the number and the bound."""
        if self.size % SIZE_STEP or not MIN_SIZE <= self.size <= MAX_SIZE:
            low, high = format_size(MIN_SIZE), format_size(MAX_SIZE)
            raise ValueError(f"size {self.size} is not a multiple of 2M in [{low}, {high}]")
        if not 0 <= self.free_share <= 0.9:
            raise ValueError(f"free share {self.free_share} is outside [0, 0.9]")
        for name in ("dirty_rate", "bandwidth"):
            value = getattr(self, name)
            if value is not None and value < PAGE_SIZE:
                raise ValueError(f"{name.replace('_', ' ')} {value} is less than one page ({PAGE_SIZE}) a second")
        if self.precopy_rounds is not None and not 0 <= self.precopy_rounds <= 1000:
            raise ValueError(f"precopy rounds {self.precopy_rounds} is outside [0, 1000]")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed {self.seed} is outside [0, 2**63)")
        if not 1 <= self.vcpus <= 8:
            raise ValueError(f"vcpus {self.vcpus} is outside [1, 8]")
        if not 1 <= self.streams <= MAX_STREAMS:
            raise ValueError(f"streams {self.streams} is outside [1, {MAX_STREAMS}]")
        if not 0 <= self.reconnect_timeout <= 86400:
            raise ValueError(f"reconnect timeout {self.reconnect_timeout} is outside [0, 86400] seconds")
        for name, allowed in (
            ("guest", ("auto", "kvm", "process")),
            ("dirty_log", DIRTY_LOGS),
            ("link", ("unix", "tcp")),
            ("duplicates", ("tolerant", "strict")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name.replace('_', ' ')} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.dirty_log not in _LOGS_OF[self.guest]:
            raise ValueError(f"a {self.guest} guest has no dirty log {self.dirty_log!r}")
        for name in ("downtime_limit", "timeout", "stall_timeout"):
            if not 0 < getattr(self, name) <= 86400:
                raise ValueError(f"{name.replace('_', ' ')} {getattr(self, name)} is outside (0, 86400] seconds")
        if self.settle_steps < 0:
            raise ValueError(f"settle steps {self.settle_steps} is negative")
        if self.throttle and self.postcopy:
            raise ValueError("--throttle is for precopy alone: with postcopy the switch needs no slow guest")
        if self.emulate_qemu and not (self.hints and self.postcopy):
            raise ValueError("--emulate-qemu shows what hints do to postcopy: it needs both")

    @property
    def npages(self) -> int:
        """Pages of the guest."""
        return self.size // PAGE_SIZE

    @property
    def max_rounds(self) -> int:
        """The most precopy rounds before the switch."""
        if self.precopy_rounds is not None:
            return self.precopy_rounds
        return ROUNDS_BEFORE_POSTCOPY if self.postcopy else ROUNDS_WITHOUT_POSTCOPY

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the configuration of a child process and for ``--json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Options:
        """The options that `to_json` made.

        Raises
        ------
        ValueError
            If there is one that is not known, or has no sense.
        """
        unknown = set(given) - {one.name for one in fields(cls)}
        if unknown:
            raise ValueError(f"options {', '.join(sorted(unknown))} are not known")
        return cls(**given)
