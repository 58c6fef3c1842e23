"""Whether precopy gets anywhere: figures of each round, and what to do about them."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

__all__ = ["Advice", "Convergence", "ConvergenceMeter"]


class Advice(enum.Enum):
    """What a controller should do after a round."""

    GO_ON = "go on"
    THROTTLE = "throttle"
    POSTCOPY = "switch to postcopy"
    FINISH = "stop the guest and send the rest"


@dataclass(frozen=True, slots=True)
class Convergence:
    """How one round of precopy went.

    Attributes
    ----------
    round : int
        From 1.
    seconds : float
        From sync to sync.
    newly_dirty : int
        Bytes that the guest wrote to pages that were not owed, as the sync at the end of the round counted them.
    remaining : int
        Bytes owed after that sync.
    sent : int
        Bytes that went out in the round.
    dirty_rate : float
        Bytes a second that became owed.
    bandwidth : float
        Bytes a second that the link carries: given, or measured over the rounds.
    expected_downtime : float
        Seconds to send what remains with the guest stopped; infinite where nothing was sent yet.
    rounds_left : float
        Rounds until the downtime limit is met, if guest and link go on like this; infinite where they never meet it.
    advice : Advice
    """

    round: int
    seconds: float
    newly_dirty: int
    remaining: int
    sent: int
    dirty_rate: float
    bandwidth: float
    expected_downtime: float
    rounds_left: float
    advice: Advice


class ConvergenceMeter:
    """Turns what a controller counts each round into figures and advice.

    Parameters
    ----------
    downtime_limit : float
        Seconds that the guest may stand still.
    bandwidth : float, optional
        Bytes a second of the link. By default what the rounds measured: a mean that the last round weighs half of.
    postcopy : bool
        Whether a switch to postcopy is possible: the way out where throttling is not wanted.
    patience : int
        Rounds in a row that have to fail to shrink the debt by a tenth before the advice is anything but going on. One
        round may be bad luck, and the first always has everything to send.

    Raises
    ------
    ValueError
        If a number is out of its bounds.
    """

    # A round that leaves more than this share of what the one before left has got nowhere.
    SHRINKS = 0.9

    def __init__(
        self, downtime_limit: float, *, bandwidth: float | None = None, postcopy: bool = False, patience: int = 2
    ) -> None:
        if not 0 <= downtime_limit < math.inf:
            raise ValueError(f"downtime_limit {downtime_limit} is outside [0, inf)")
        if bandwidth is not None and not 0 < bandwidth < math.inf:
            raise ValueError(f"bandwidth {bandwidth} is outside (0, inf)")
        if patience < 1:
            raise ValueError(f"patience {patience} is less than 1")
        self._limit = downtime_limit
        self._given = bandwidth
        self._postcopy = postcopy
        self._patience = patience
        self._measured = 0.0
        self._rounds = 0
        self._left = math.inf
        self._stuck = 0

    def end_round(self, *, seconds: float, sent: int, newly_dirty: int, remaining: int) -> Convergence:
        """Enter a round after the sync that ended it.

        Parameters
        ----------
        seconds : float
            From the sync before to this one; above 0.
        sent, newly_dirty, remaining : int
            Bytes: what went out, ``tracker.newly_dirty_bytes``, and ``tracker.counts().dirty_bytes``.

        Returns
        -------
        Convergence

        Raises
        ------
        ValueError
            If a number is out of its bounds; the round does not count then.
        """
        if not 0 < seconds < math.inf:
            raise ValueError(f"seconds {seconds} are outside (0, inf)")
        for name, value in (("sent", sent), ("newly_dirty", newly_dirty), ("remaining", remaining)):
            if value < 0:
                raise ValueError(f"{name} {value} is negative")
        self._rounds += 1
        if sent:
            rate = sent / seconds
            self._measured = (self._measured + rate) / 2 if self._measured else rate
        bandwidth = self._given or self._measured
        downtime = remaining / bandwidth if bandwidth else (math.inf if remaining else 0.0)
        self._stuck = self._stuck + 1 if remaining > self._left * self.SHRINKS else 0
        self._left = remaining
        dirty_rate = newly_dirty / seconds
        return Convergence(
            round=self._rounds,
            seconds=seconds,
            newly_dirty=newly_dirty,
            remaining=remaining,
            sent=sent,
            dirty_rate=dirty_rate,
            bandwidth=bandwidth,
            expected_downtime=downtime,
            rounds_left=self._rounds_left(dirty_rate, bandwidth, downtime),
            advice=self._advice(downtime),
        )

    def _advice(self, downtime: float) -> Advice:
        if downtime <= self._limit:
            return Advice.FINISH
        if self._stuck < self._patience:
            return Advice.GO_ON
        return Advice.POSTCOPY if self._postcopy else Advice.THROTTLE

    def _rounds_left(self, dirty_rate: float, bandwidth: float, downtime: float) -> float:
        """Each round leaves what was written while the one before was sent: a geometric series."""
        if downtime <= self._limit:
            return 0.0
        if dirty_rate <= 0:
            return 1.0
        if bandwidth <= dirty_rate or self._limit <= 0:
            return math.inf
        return float(math.ceil(math.log(downtime / self._limit) / math.log(bandwidth / dirty_rate)))
