"""What a placement loop has done, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LatencyHistogram", "PlacementStats"]


@dataclass(frozen=True, slots=True)
class LatencyHistogram:
    """Latencies in log2 buckets: bucket b counts those of [2**b, 2**(b+1)) nanoseconds.

    Attributes
    ----------
    buckets : tuple of int
        Counts.
    total_ns, max_ns : int
        Sum and maximum, in nanoseconds.
    """

    buckets: tuple[int, ...] = ()
    total_ns: int = 0
    max_ns: int = 0

    @property
    def count(self) -> int:
        """Samples in all buckets."""
        return sum(self.buckets)

    @property
    def mean_ns(self) -> float:
        """Arithmetic mean in nanoseconds; 0.0 without samples."""
        return self.total_ns / self.count if self.count else 0.0

    def percentile(self, percent: float) -> float:
        """Estimate a percentile.

        Parameters
        ----------
        percent : float
            In [0, 100].

        Returns
        -------
        float
            Nanoseconds, interpolated linearly inside its bucket and never above the maximum seen; 0.0 without samples.

        Raises
        ------
        ValueError
            `percent` is outside [0, 100].
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"percentile {percent} is outside [0, 100]")
        rank = self.count * percent / 100
        below = 0
        for bucket, samples in enumerate(self.buckets):
            if samples and below + samples >= rank:
                low = 1 << bucket
                return min(low + low * (rank - below) / samples, float(self.max_ns))
            below += samples
        return 0.0


@dataclass(frozen=True, slots=True)
class PlacementStats:
    """Counters of a placement loop; pages unless said otherwise.

    Attributes
    ----------
    placed : int
        Content of the source, accepted by the kernel.
    moved : int
        Those of them that came in a whole block of 2 MiB, and went by MOVE.
    zeroed : int
        Zero pages of the source.
    filled : int
        Hinted pages, filled without a round trip or by a FILL answer.
    refilled : int
        Zero fills of pages that the guest had discarded; may repeat.
    duplicates : int
        Copies of pages that had been claimed already.
    dropped : int
        Copies of pages that the guest had discarded, or that are excluded.
    foreign : int
        Pages that were present although nobody had placed them.
    deferred : int
        Placements that had to be tried again (a discard was pending, or no memory).
    gone : int
        Pages whose memory is no longer mapped or registered.
    lost : int
        Received pages that were found missing.
    poisoned : int
        Pages that fail closed: touching them raises SIGBUS.
    faults : int
        Fault messages read.
    requested : int
        Pages asked of the source.
    already_sent : int
        Pages that the source answered with "already sent".
    removed : int
        Pages that the guest discarded.
    unsampled : int
        Faults that no histogram counts.
    ahead : int
        Pages placed around a fault, before anybody touched them.
    background : int
        Pages that the background fill went over.
    fetches, fetch_ns : int
        Calls of a pull source that may sleep, and the nanoseconds that they took in all.
    forks : int
        Children of the process, which are not served: what they have not got fails closed.
    shortages : int
        Placements that the kernel had no memory for; each is tried again until it has, and counts every time.
    windows_right, windows_wrong : int
        Guesses of the fault-around that the guest walked through to their end, and those that it left behind.
    resident : int
        Pages received, including those from before the start.
    page_size : int
        Bytes of a page.
    outcomes : dict
        Pages by what they were to hold ("new": content of the source, "zero": zeros or a fill, "resident": received
        before) and then by what became of them ("installed", "present", "deferred": to be tried again, and counted once
        more then, "discarded", "error").
    reached_ns : dict
        From a percentage to the nanoseconds after the start at which so many pages were received. Those reached before
        the start, or not yet, are missing.
    latency : dict
        From "owed", "hinted", "released" and "present" to the histogram of the time from the read of a fault to
        the wake.
    """

    placed: int
    moved: int
    zeroed: int
    filled: int
    refilled: int
    duplicates: int
    dropped: int
    foreign: int
    deferred: int
    gone: int
    lost: int
    poisoned: int
    faults: int
    requested: int
    already_sent: int
    removed: int
    unsampled: int
    ahead: int
    background: int
    fetches: int
    fetch_ns: int
    forks: int
    shortages: int
    windows_right: int
    windows_wrong: int
    resident: int
    page_size: int
    outcomes: dict[str, dict[str, int]]
    reached_ns: dict[int, int]
    latency: dict[str, LatencyHistogram]

    def buckets(self) -> list[int]:
        """The fault latencies of all classes together, as in `LatencyHistogram`; empty buckets at the end left out."""
        sums = [sum(counts) for counts in zip(*(one.buckets for one in self.latency.values()), strict=True)]
        while sums and not sums[-1]:
            sums.pop()
        return sums

    @property
    def bytes(self) -> dict[str, dict[str, int]]:
        """The outcomes in bytes."""
        return {
            kind: {result: pages * self.page_size for result, pages in results.items()}
            for kind, results in self.outcomes.items()
        }

    def seconds_to_resident(self, percent: int) -> float | None:
        """How long after the start a share of the pages was received.

        Parameters
        ----------
        percent : int
            1 to 100.

        Returns
        -------
        float or None
            Seconds; None where it was reached before the start, or is not yet.
        """
        reached = self.reached_ns.get(percent)
        return None if reached is None else reached / 1e9
