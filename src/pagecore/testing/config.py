"""GuestConfig: what a test guest is, and what its memory must hold follows from."""

from __future__ import annotations

import dataclasses

from pagecore.testing import _machine_state

__all__ = ["GuestConfig"]

PAGE_SIZE = 4096
BLOCK_SIZE = 2 << 20
MINIMUM_SIZE = 16 << 20
MAXIMUM_SIZE = 256 << 30
FLAT_OUT_BATCH = 1024
TICK_SECONDS = 0.002


@dataclasses.dataclass(frozen=True, slots=True)
class GuestConfig:
    """What a test guest is.

    Parameters
    ----------
    size : int
        Bytes of memory: a multiple of 2 MiB, 16 MiB to 256 GiB.
    seed : int
        64 bits; all content and every step follow from it.
    vcpus : int
        1 to 16; each owns a contiguous share of the data pages.
    free_share : float
        How much of the data pages is free, 0.0 to 0.95. It stays about constant.
    dirty_rate : float or None
        Bytes that all vCPUs together write in a second; None for as fast as they can.

    Raises
    ------
    ValueError
        If one of them is out of bounds.
    """

    size: int
    seed: int = 0
    vcpus: int = 1
    free_share: float = 0.5
    dirty_rate: float | None = None

    def __post_init__(self) -> None:
        if self.size % BLOCK_SIZE or not MINIMUM_SIZE <= self.size <= MAXIMUM_SIZE:
            raise ValueError(f"size {self.size} is not a multiple of 2 MiB in [{MINIMUM_SIZE}, {MAXIMUM_SIZE}]")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed {self.seed} is outside [0, 2**64)")
        if not 1 <= self.vcpus <= _machine_state.MAX_VCPUS:
            raise ValueError(f"{self.vcpus} vCPUs are outside [1, {_machine_state.MAX_VCPUS}]")
        if not 0.0 <= self.free_share <= 0.95:
            raise ValueError(f"free_share {self.free_share} is outside [0.0, 0.95]")
        if self.dirty_rate is not None and not 0 < self.dirty_rate < 1e15:
            raise ValueError(f"dirty_rate {self.dirty_rate} is not a number of bytes a second above 0")

    @property
    def npages(self) -> int:
        """Pages of 4 KiB."""
        return self.size // PAGE_SIZE

    @property
    def share(self) -> int:
        """`free_share` of 2**32: steps are decided in integers, the same on every machine."""
        return round(self.free_share * (1 << 32))

    @property
    def pages_per_second(self) -> float:
        """Pages that one vCPU writes in a second; 0.0 for as many as it can."""
        return 0.0 if self.dirty_rate is None else self.dirty_rate / PAGE_SIZE / self.vcpus

    @property
    def batch(self) -> int:
        """Steps between two ticks of a vCPU: one to two milliseconds of work."""
        if self.dirty_rate is None:
            return FLAT_OUT_BATCH
        # A quarter of the picks of an allocated page write it, and allocations replace what is freed.
        writes_per_step = (1 - self.free_share) * (1 + self.free_share) / 4
        steps = self.pages_per_second / writes_per_step * TICK_SECONDS
        return min(max(round(steps), 8), FLAT_OUT_BATCH)
