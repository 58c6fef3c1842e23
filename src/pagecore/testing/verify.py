"""verify_memory: whether a stopped test guest's memory is what its seed and its steps say, page by page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pagecore.testing import _machine_state, _verify
from pagecore.testing.config import GuestConfig
from pagecore.testing.guest import Guest

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["Verification", "verify_memory"]


@dataclasses.dataclass(frozen=True, slots=True)
class Verification:
    """What a comparison found.

    Attributes
    ----------
    right, wrong, free : int
        Data pages that hold what they must, that do not, and that the guest holds free (content undefined).
    wrong_pages : tuple of int
        The first of the wrong ones, at most 64.
    steps : tuple of int
        Steps of each vCPU, to which the guest was replayed.
    reserved_right, reserved_wrong : int
        Page tables, code, control pages and the table of versions, counted apart.
    reserved_wrong_pages : tuple of int
        The first of the wrong ones, at most 64.
    unchecked : int
        Hint rings and stacks: the host's timing decides what they hold.
    self_check_errors : int
        Errors that the guest found itself while it ran.
    """

    right: int
    wrong: int
    free: int
    wrong_pages: tuple[int, ...]
    steps: tuple[int, ...]
    reserved_right: int
    reserved_wrong: int
    reserved_wrong_pages: tuple[int, ...]
    unchecked: int
    self_check_errors: int

    @property
    def exact(self) -> bool:
        """True if nothing at all is wrong."""
        return self.wrong == 0 and self.reserved_wrong == 0 and self.self_check_errors == 0

    def __str__(self) -> str:
        text = f"{self.right} pages right, {self.wrong} wrong, {self.free} free"
        if self.wrong:
            text += f" (first wrong: {', '.join(map(str, self.wrong_pages[:8]))})"
        if self.reserved_wrong:
            text += f"; {self.reserved_wrong} reserved pages wrong: " + ", ".join(
                map(str, self.reserved_wrong_pages[:8])
            )
        if self.self_check_errors:
            text += f"; the guest found {self.self_check_errors} errors itself"
        return text


def verify_memory(
    guest: Guest | ReadableBuffer, config: GuestConfig | None = None, *, steps: Sequence[int] | None = None
) -> Verification:
    """Compare the memory of a stopped test guest with what its seed says.

    Parameters
    ----------
    guest : Guest or buffer
        A guest that is paused or has stopped itself, or all of its memory.
    config : GuestConfig, optional
        Needed where only the memory is given.
    steps : sequence of int, optional
        Steps of each vCPU. By default the control pages in the memory say how far each vCPU came; nothing
        else in the memory is believed.

    Returns
    -------
    Verification

    Raises
    ------
    ValueError
        If `config` is missing, or the memory has another size than it says.

    Notes
    -----
    Releases the GIL: a missing page may be filled meanwhile.
    Not thread-safe with a guest that runs.
    Needs no kernel interface.
    """
    memory: ReadableBuffer
    if isinstance(guest, Guest):
        memory, config = guest.memory, config or guest.config
    else:
        memory = guest
    if config is None:
        raise ValueError("memory alone does not say what it must hold: pass the guest's config")
    size = memoryview(memory).nbytes
    if size != config.size:
        raise ValueError(f"memory of {size} bytes is not that of a guest of {config.size} bytes")
    found = _verify.verify(memory, config.vcpus, config.seed, config.share, _machine_state.program_code(), steps)
    errors = found.pop("errors")
    return Verification(self_check_errors=errors, **found)
