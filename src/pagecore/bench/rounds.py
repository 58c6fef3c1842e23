"""Paired rounds: every contender in each round, in rotating order, and ratios within the round."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

EVICTED = 96 << 20
RETRIES = 8


@dataclass
class Contender:
    """One of several ways to do the same: `call` is timed, `prepare` runs before it."""

    call: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    nanoseconds: list[int] = field(default_factory=list)
    answer: Any = None

    @property
    def median(self) -> float:
        """Nanoseconds of a call."""
        return statistics.median(self.nanoseconds)


class Cache:
    """Memory that is larger than what a core may call its own; reading it puts everything else out."""

    def __init__(self, nbytes: int = EVICTED) -> None:
        self._words = np.ones(nbytes // 8, np.uint64)

    def evict(self) -> None:
        """Read a word of each line."""
        self._words[::8].sum()


def interruptions() -> int:
    """How often the scheduler took the processor from this thread."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


def measure(contenders: dict[str, Contender], rounds: int, cache: Cache | None) -> None:
    """Time every contender once a round; cold if there is a cache to evict. An interrupted call is repeated."""
    names = list(contenders)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            contender = contenders[name]
            for _ in range(RETRIES):
                contender.prepare()
                if cache is not None:
                    cache.evict()
                before = interruptions()
                start = time.perf_counter_ns()
                contender.answer = contender.call()
                elapsed = time.perf_counter_ns() - start
                if interruptions() == before:
                    break
            contender.nanoseconds.append(elapsed)


def ratio(ours: Contender, peer: Contender) -> float:
    """How many times as fast as the peer: the median of the rounds' ratios."""
    return statistics.median(b / a for a, b in zip(ours.nanoseconds, peer.nanoseconds, strict=True))
