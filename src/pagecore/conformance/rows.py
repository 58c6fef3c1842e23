"""What a row of the table is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from pagecore.conformance.vmm import Vmm

__all__ = ["DECLARED", "Row", "row"]

Body = TypeVar("Body", bound=Callable[[Vmm], str])


@dataclass(frozen=True)
class Row:
    """One line of the table: in this situation, this is done, and that must happen.

    Attributes
    ----------
    name : str
        Short, for scripts.
    situation, operation, must : str
        The line.
    body : callable
        Plays it, and returns what was seen; raises `Failed` or `NotApplicable`.
    sigbus : bool
        A SIGBUS of the guest is what may happen, too: it fails closed.
    restart : bool
        The row ends the handler and wants another one.
    """

    name: str
    situation: str
    operation: str
    must: str
    body: Callable[[Vmm], str]
    sigbus: bool = False
    restart: bool = False


# Filled by the modules of rows as they are imported; pagecore.conformance.table puts them in order.
DECLARED: Final[dict[str, Row]] = {}


def row(
    name: str, situation: str, operation: str, must: str, *, sigbus: bool = False, restart: bool = False
) -> Callable[[Body], Body]:
    """Put a function into the table."""

    def declare(body: Body) -> Body:
        assert name not in DECLARED, name
        DECLARED[name] = Row(name, situation, operation, must, body, sigbus, restart)
        return body

    return declare
