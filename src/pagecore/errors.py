"""The exception tree, and the one function that turns an errno into it.

Races are results (``PlaceResult``); misuse and loss are exceptions. Misuse of an argument is plain ``TypeError``,
``ValueError`` or ``IndexError`` with the number and the bound in the message.
"""

from __future__ import annotations

import errno
import os
from typing import NoReturn

__all__ = [
    "BusyError",
    "ClosedError",
    "OutOfMemoryError",
    "PagecoreError",
    "PeerGoneError",
    "ProtocolError",
    "SourceError",
    "UffdError",
    "UnreadableError",
    "UnsupportedError",
    "raise_for_errno",
]


class PagecoreError(Exception):
    """Base of every error that pagecore raises on its own account."""


class UffdError(PagecoreError, OSError):
    """A kernel call failed for good.

    Attributes
    ----------
    errno : int
        The kernel's answer.
    operation : str
        What was tried, as the kernel names it (``UFFDIO_COPY``).
    address, length : int
        The bytes concerned; 0 where the call has none.
    """

    def __init__(self, number: int, operation: str, address: int = 0, length: int = 0) -> None:
        where = f" on [{address:#x}, {address + length:#x})" if length else ""
        super().__init__(number, f"{operation}{where}: {os.strerror(number)}")
        self.operation = operation
        self.address = address
        self.length = length


class OutOfMemoryError(UffdError):
    """There was no memory for a page: of the machine, of the cgroup of the process that it is for, or of the pool of
    huge pages. Nothing was lost; it may be tried again later."""


class UnreadableError(UffdError):
    """The data that was to be placed cannot be read: its memory is unmapped, protected, or beyond the end of a file."""


class UnsupportedError(PagecoreError):
    """The kernel or this user lacks a feature; the message names it and what enables it.

    Attributes
    ----------
    feature : str
        The missing feature.
    remedy : str
        The kernel that has it, or the command that enables it.
    """

    def __init__(self, feature: str, remedy: str) -> None:
        super().__init__(f"{feature} is not available: {remedy}")
        self.feature = feature
        self.remedy = remedy


class PeerGoneError(PagecoreError):
    """The process whose memory this is, or the peer of the link, has ended."""


class SourceError(PagecoreError):
    """A page source failed; its pages stay missing (never zeros).

    Attributes
    ----------
    first_page, page_count : int
        The run that could not be had.
    """

    def __init__(self, message: str, first_page: int = 0, page_count: int = 0) -> None:
        super().__init__(message)
        self.first_page = first_page
        self.page_count = page_count


class ProtocolError(PagecoreError):
    """A frame of the peer is malformed; the message names the field.

    Attributes
    ----------
    field : str
        The field of the frame that cannot be right.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class ClosedError(PagecoreError, ValueError):
    """The object was used after ``close()``."""


class BusyError(PagecoreError, RuntimeError):
    """The object is in use in a way that excludes this one (two readers of one descriptor)."""


def raise_for_errno(number: int, operation: str, address: int = 0, length: int = 0) -> NoReturn:
    """Raise the exception that stands for a kernel answer.

    Parameters
    ----------
    number : int
        A positive errno.
    operation : str
        What was tried.
    address, length : int
        The bytes concerned, in bytes; length 0 where there are none.

    Raises
    ------
    PeerGoneError
        ESRCH: the process whose memory it is has ended (Linux 4.13 and newer).
    UffdError
        Everything else.
    """
    if number == errno.ESRCH:
        raise PeerGoneError(f"{operation}: the process whose memory this is has ended")
    raise UffdError(number, operation, address, length)
