"""What the source tells of its guest in the HELLO, and what the destination makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pagecore.errors import ProtocolError
from pagecore.migrate.options import PAGE_SIZE, Options, format_size
from pagecore.wire import Hello

__all__ = ["boot_id", "describe", "learn", "same_clock"]

# The guest is the source's: the destination has these from it, and everything else from its own command line.
_TOLD: Final[dict[str, tuple[type, ...]]] = {
    "seed": (int,),
    "vcpus": (int,),
    "free_share": (int, float),
    "dirty_rate": (int, type(None)),
    "settle_steps": (int,),
    "postcopy": (bool,),
    "emulate_qemu": (bool,),
}
_KINDS: Final = ("kvm", "process")


def boot_id() -> str:
    """Names this run of this machine: who says the same has the same CLOCK_MONOTONIC."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def same_clock(peer: Hello) -> bool:
    """Whether a time that the peer tells may be compared with one of this side."""
    return peer.details.get("boot") == boot_id()


def describe(options: Options, kind: str) -> dict[str, Any]:
    """The details of the source's HELLO."""
    return {"guest": kind, **{name: getattr(options, name) for name in _TOLD}}


def learn(own: Options, theirs: Hello, max_size: int | None) -> Options:
    """The options of the destination, once it knows the guest.

    Parameters
    ----------
    own : Options
        Its own, from the command line.
    theirs : Hello
    max_size : int or None
        Bytes of memory that a guest may have here.

    Raises
    ------
    ProtocolError
        Naming what is not as it has to be.
    """
    if theirs.page_size != PAGE_SIZE:
        raise ProtocolError("page_size", f"the peer says {theirs.page_size}, this side {PAGE_SIZE}")
    if set(theirs.regions) != {0}:
        raise ProtocolError("regions", f"{sorted(theirs.regions)}; a guest here has region 0 alone")
    size = theirs.regions[0] * PAGE_SIZE
    if max_size is not None and size > max_size:
        raise ProtocolError("size", f"a guest of {format_size(size)}; this side takes {format_size(max_size)} at most")
    kind = theirs.details.get("guest")
    if kind not in _KINDS:
        raise ProtocolError("guest", f"{kind!r} is neither kvm nor process")
    told: dict[str, Any] = {"guest": kind}
    for name, types in _TOLD.items():
        value = told[name] = theirs.details.get(name)
        # JSON's true is an int to Python.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ProtocolError(name, "is missing" if name not in theirs.details else f"{value!r} is of the wrong type")
    try:
        # `hints` is the source's business; here it only says that --emulate-qemu has what it needs.
        return replace(own, size=size, hints=True, **told)
    except ValueError as error:
        raise ProtocolError("guest", str(error)) from None
