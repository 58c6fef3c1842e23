"""Firecracker's handshake with a page-fault handler, all versions: one message with the regions and the descriptor.

The VMM connects to a Unix socket and sends a JSON array of regions, without a length or an end, and with its first
byte one descriptor. Nothing else is ever sent, and nothing is expected back. Offsets are those of the snapshot file.
"""

from __future__ import annotations

import array
import json
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from pagecore.errors import ProtocolError, UnsupportedError

__all__ = ["GuestRegion", "parse_handshake", "receive_handshake"]

PAGE_SIZES: Final = (4096, 2 << 20, 1 << 30)
# What is refused before memory is taken for it (W4): hot-plugged memory makes some hundred regions of about 120 bytes.
MAX_BYTES: Final = 1 << 20
MAX_DESCRIPTORS: Final = 4


@dataclass(frozen=True)
class GuestRegion:
    """A part of the guest's memory.

    Attributes
    ----------
    address : int
        Where it lies in the VMM.
    size : int
        Bytes.
    offset : int
        Where its content begins in the snapshot, in bytes.
    page_size : int
        Bytes.
    """

    address: int
    size: int
    offset: int
    page_size: int


def parse_handshake(body: bytes, *, snapshot_size: int | None = None) -> list[GuestRegion]:
    """Read the regions of a handshake, and believe nothing.

    Parameters
    ----------
    body : bytes
        The JSON text. Fields that this does not know are ignored, as later versions may have more.
    snapshot_size : int, optional
        Bytes of the snapshot, which no region may reach beyond.

    Returns
    -------
    list of GuestRegion
        In the order in which they came.

    Raises
    ------
    ProtocolError
        It is no such JSON, or a number cannot be right; `field` names it.
    UnsupportedError
        Pages of several sizes.
    """
    try:
        listed = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("handshake", f"no JSON: {error}") from None
    if not isinstance(listed, list) or not listed:
        raise ProtocolError("handshake", "not a list of at least one region")
    regions = [_region(number, fields) for number, fields in enumerate(listed)]
    if len({region.page_size for region in regions}) > 1:
        raise UnsupportedError("pages of several sizes in one guest", "give all regions the same page_size")
    _check_apart("base_host_virt_addr", [(region.address, region.size) for region in regions])
    _check_apart("offset", [(region.offset, region.size) for region in regions])
    end = max(region.offset + region.size for region in regions)
    if snapshot_size is not None and end > snapshot_size:
        raise ProtocolError("offset", f"the regions end at {end}, the snapshot has {snapshot_size} bytes")
    return regions


def _region(number: int, fields: Any) -> GuestRegion:
    if not isinstance(fields, dict):
        raise ProtocolError("handshake", f"region {number} is {type(fields).__name__}, not an object")
    # Until 1.11 `page_size_kib` is the only size, and it is in bytes; before 1.7 there is none.
    page_size = _number(number, fields, "page_size", _number(number, fields, "page_size_kib", PAGE_SIZES[0]))
    if page_size not in PAGE_SIZES:
        raise ProtocolError("page_size", f"{page_size} of region {number} is none of {PAGE_SIZES}")
    address = _number(number, fields, "base_host_virt_addr")
    size = _number(number, fields, "size")
    offset = _number(number, fields, "offset")
    for name, value in (("base_host_virt_addr", address), ("size", size), ("offset", offset)):
        if value % page_size:
            raise ProtocolError(name, f"{value} of region {number} is not a multiple of page size {page_size}")
    if size == 0:
        raise ProtocolError("size", f"region {number} is empty")
    if address + size > 1 << 64 or offset + size >= 1 << 63:
        raise ProtocolError("size", f"region {number} of {size} bytes reaches beyond any address or file")
    return GuestRegion(address, size, offset, page_size)


def _number(number: int, fields: dict[str, Any], name: str, default: int | None = None) -> int:
    value = fields.get(name, default)
    if value is None:
        raise ProtocolError(name, f"missing in region {number}")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise ProtocolError(name, f"{value!r:.40} of region {number} is outside [0, 2**64)")
    return value


def _check_apart(name: str, ranges: Iterable[tuple[int, int]]) -> None:
    position = 0
    for first, length in sorted(ranges):
        if first < position:
            raise ProtocolError(name, f"two regions overlap at {first:#x}")
        position = first + length


def receive_handshake(stream: socket.socket, *, timeout: float) -> tuple[bytes, int]:
    """Receive a handshake.

    Parameters
    ----------
    stream : socket.socket
        The VMM's connection.
    timeout : float
        Seconds for all of it.

    Returns
    -------
    bytes
        The JSON text, for `parse_handshake`.
    int
        The descriptor, close-on-exec; the caller owns it.

    Raises
    ------
    ProtocolError
        The text is none, or too long, or did not end in time; there is not exactly one descriptor. None is leaked.
    """
    deadline = time.monotonic() + timeout
    body = b""
    descriptors: list[int] = []
    try:
        while not _complete(body):
            if len(body) > MAX_BYTES:
                raise ProtocolError("handshake", f"longer than {MAX_BYTES} bytes")
            stream.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                part, received, flags = _receive(stream)
            except TimeoutError:
                raise ProtocolError("handshake", f"{len(body)} bytes in {timeout:g} s, and not complete") from None
            descriptors += received
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError("descriptor", f"more than {MAX_DESCRIPTORS} came")
            if not part:
                raise ProtocolError("handshake", f"the connection ended after {len(body)} bytes")
            body += part
            if body.lstrip()[:1] not in (b"", b"["):
                raise ProtocolError("handshake", "not a list of regions")
        if len(descriptors) != 1:
            raise ProtocolError("descriptor", f"{len(descriptors)} came, not one")
        return body, descriptors.pop()
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _receive(stream: socket.socket) -> tuple[bytes, list[int], int]:
    space = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
    data, ancillary, flags, _ = stream.recvmsg(1 << 16, space, socket.MSG_CMSG_CLOEXEC)
    received = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received.frombytes(content[: len(content) - len(content) % received.itemsize])
    return data, received.tolist(), flags


def _complete(body: bytes) -> bool:
    """Whether the text is one whole JSON value: nothing says how long it is."""
    if not body.rstrip().endswith(b"]"):
        return False
    try:
        json.loads(body)
    except ValueError as error:
        # A bracket within the text is not its end. What comes behind the end makes it no handshake, now or later.
        return "Extra data" in str(error)
    except RecursionError:
        return True
    return True
