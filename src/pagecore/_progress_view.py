"""How a migration looks while it runs: live on a terminal, plain lines where there is none."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import Any, Final, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from pagecore.migrate import Options, format_size
from pagecore.migrate.options import PAGE_SIZE
from pagecore.migrate.series import latency_between

__all__ = ["ProgressView", "Standing", "progress_view", "shown", "time_text"]

PLAIN_INTERVAL: Final = 1.0
# A rate is that of the last second, but for the first one.
WINDOW: Final = 1.0
INTERRUPTED: Final = "ending; a second Ctrl-C ends both sides at once, and the guest with them"
GOES_ON: Final = (
    "the guest runs at the destination already: the rest is being sent; a second Ctrl-C gives up, and the guest is lost"
)

# Both sides tell of the phases that they share: there the source's word counts.
_LAST_PHASES: Final = ("settle", "verify")
PHASES: Final = {
    "boot": "the guest fills its memory",
    "connect": "connecting",
    "precopy": "precopy",
    "switch": "switch: the guest stands still",
    "postcopy": "postcopy: the guest runs at the destination",
    "finish": "finishing",
    "settle": "the last pages settle",
    "verify": "verifying all of the memory",
}
# The bar has half of 80 columns for what happens beside it.
_SHORT: Final = {"switch": "switch", "postcopy": "postcopy", "verify": "verifying"}


def shown(text: str) -> str:
    """A text of the other side or of a file, without what a terminal would obey."""
    return "".join(one if one.isprintable() else "?" for one in text)


def time_text(microseconds: float) -> str:
    """A time in the unit that suits it."""
    if microseconds >= 1e6:
        return f"{microseconds / 1e6:.2f} s"
    if microseconds >= 1e3:
        return f"{microseconds / 1e3:.1f} ms"
    return f"{microseconds:.0f} us"


class ProgressView(Protocol):
    """Follows the events of a migration."""

    def event(self, event: dict[str, Any]) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def progress_view(options: Options, console: Console, *, quiet: bool) -> ProgressView:
    """Live on a terminal, plain lines elsewhere, nothing where nobody wants it."""
    if quiet:
        return _Silent()
    return _Live(options, console) if console.is_terminal else _Plain(console)


class Standing:
    """Where a migration stands, from its events: sums, and rates of the last second."""

    def __init__(self) -> None:
        self.phase = ""
        self.round = 0
        self._paused = False
        self._interrupted = False
        self._recent: dict[str, deque[dict[str, Any]]] = {"source": deque(), "destination": deque()}
        self._round: dict[str, Any] = {}

    def take(self, event: dict[str, Any]) -> str | None:
        """Take an event in.

        Returns
        -------
        str or None
            What to tell a person of it at once.
        """
        name, role = event["event"], event["role"]
        if name == "progress" and role in self._recent:
            recent = self._recent[role]
            recent.append(event)
            while len(recent) > 2 and recent[1]["at"] <= event["at"] - WINDOW:
                recent.popleft()
        elif name == "guest":
            return f"guest: {event['kind']} ({event['reason']})"
        elif name == "phase" and (role == "source" or event["phase"] in _LAST_PHASES):
            before = self.arrived
            self.phase, self.round = event["phase"], event.get("round", 0)
            if self._interrupted and self.arrived and not before:
                return GOES_ON
        elif name == "round":
            self._round = event
            return (
                f"round {event['round']}: {format_size(event['sent'])} sent in {event['seconds']:.2f} s,"
                f" {format_size(event['remaining'])} dirty since ({format_size(event['dirty_rate'])}/s)"
            )
        elif name == "running":
            return f"the guest runs at the destination after {event['downtime'] * 1e3:.1f} ms"
        elif name in ("failed", "lost") and event["error"]:
            return f"{role}: {event['error']}"
        elif name == "link_lost" and role == "source":
            return f"the link is lost: {event['error']}; trying to meet again"
        elif name == "reconnected" and role == "source":
            return f"the link is back after {time_text(event['seconds'] * 1e6)}"
        elif name in ("paused", "resumed") and role == "source":
            self._paused = name == "paused"
            if self._paused:
                return f"paused{': the guest gets what it waits for, and nothing else' if self.arrived else ''}"
            return f"the transfer goes on after {time_text(event['seconds'] * 1e6)}"
        elif name == "not_paused":
            return f"not paused: {event['reason']}"
        elif name == "interrupted" and event["times"] == 1:
            self._interrupted = True
            return GOES_ON if self.arrived else INTERRUPTED
        return None

    def newest(self, role: str) -> dict[str, Any]:
        """The counters that a side reported last; empty before."""
        return self._recent[role][-1] if self._recent[role] else {}

    def rate(self, role: str, *names: str) -> float:
        """The growth of a sum of counters, a second."""
        recent = [one for one in self._recent[role] if one.get(names[0])]
        if len(recent) < 2 or recent[-1]["at"] <= recent[0]["at"]:
            return 0.0
        grown = sum(recent[-1][name] - recent[0][name] for name in names)
        return float(grown / (recent[-1]["at"] - recent[0]["at"]))

    @property
    def owed(self) -> int | None:
        """Pages that the source still has to send; None before anybody knows."""
        return self.newest("source").get("owed")

    @property
    def arrived(self) -> bool:
        """Whether the guest runs at the destination."""
        return self.phase in ("postcopy", "finish", *_LAST_PHASES)

    def phase_text(self, *, short: bool = False) -> str:
        """The phase, for a person."""
        text = (_SHORT if short else {}).get(self.phase) or PHASES.get(self.phase, self.phase)
        if self.phase == "precopy" and self.round:
            text += f", round {self.round}"
        return f"{text}, paused" if self._paused else text

    def amounts(self) -> str:
        """How much is owed, hinted and sent."""
        now = self.newest("source")
        if not now:
            return ""
        return (
            f"owed {_pages(now['owed'])}   hinted {_pages(now['hinted'])}   sent {format_size(now['wire_bytes'])}"
            f" ({now['pages_sent']} pages, {now['pages_zero']} zero)"
        )

    def rates(self) -> str:
        """How fast it goes, how fast the guest writes, and when it will be over."""
        if not self.newest("source"):
            return ""
        side = "destination" if self.arrived else "source"
        # One side of two machines knows nothing of the other's guest.
        known = self.newest(side)
        words = [f"guest writes {_speed(self.rate(side, 'pages_written') * PAGE_SIZE)}"] if known else []
        if self.phase not in _LAST_PHASES:
            words.insert(0, f"link {_speed(self.rate('source', 'wire_bytes'))}")
        if self._round and not self.arrived:
            words.append(f"dirty {_speed(self._round['dirty_rate'])}")
        left = self.seconds_left()
        if left is not None:
            what = "all sent in" if self.arrived else "round ends in"
            words.append(f"{what} {left:.1f} s" if left < 100 else f"{what} {left / 60:.0f} min")
        return "   ".join(words)

    def seconds_left(self) -> float | None:
        """Until nothing is owed, as fast as it went in the last second; None where that is never, or done."""
        rate = self.rate("source", "pages_sent", "pages_zero")
        return self.owed / rate if self.owed and rate > 0 else None

    def faults(self) -> str:
        """What the guest waited for in the last second."""
        now = self.newest("destination")
        if not now.get("faults"):
            return ""
        recent = self._recent["destination"]
        latency = latency_between(recent[0].get("latency_buckets", []), now["latency_buckets"])
        text = f"faults {now['faults']} ({self.rate('destination', 'faults'):.0f}/s)   requested {now['requested']}"
        if latency.count:
            p50, p99 = (time_text(latency.percentile(percent) / 1e3) for percent in (50, 99))
            text += f"   p50 {p50}, p99 {p99}"
        return text


def _pages(count: int) -> str:
    return format_size(count * PAGE_SIZE)


def _speed(bytes_a_second: float) -> str:
    return f"{format_size(max(0.0, bytes_a_second))}/s"


class _Silent:
    def event(self, event: dict[str, Any]) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class _Plain(_Silent):
    """One line for each thing that happens, and one a second between them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._standing = Standing()
        self._began = time.monotonic()
        self._next = self._began + PLAIN_INTERVAL

    def _say(self, text: str) -> None:
        seconds = time.monotonic() - self._began
        self._console.print(f"{seconds:7.2f} s  {shown(text)}", soft_wrap=True, markup=False)

    def event(self, event: dict[str, Any]) -> None:
        """Print it, if it is of interest."""
        standing = self._standing
        before = (standing.phase, standing.round)
        text = standing.take(event)
        if text is not None:
            self._say(text)
        elif (standing.phase, standing.round) != before:
            self._say(standing.phase_text())
        elif event["event"] == "progress" and time.monotonic() >= self._next:
            texts = (standing.amounts(), standing.rates(), standing.faults() if standing.arrived else "")
            self._say("   ".join(one for one in texts if one))
        else:
            return
        self._next = time.monotonic() + PLAIN_INTERVAL


class _Live(_Silent):
    """A bar that fills as fewer pages are owed, and what is counted below it."""

    def __init__(self, options: Options, console: Console) -> None:
        self._pages = options.npages
        self._console = console
        self._standing = Standing()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(30),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("starting", total=options.npages)
        self._counts = Text(overflow="ellipsis", no_wrap=True)
        self._live = Live(Group(self._bar, self._counts), console=console, transient=True, refresh_per_second=10)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def event(self, event: dict[str, Any]) -> None:
        """Show it."""
        standing = self._standing
        text = standing.take(event)
        if text is not None:
            self._console.print(shown(text), markup=False)
        owed = standing.owed
        self._bar.update(
            self._task,
            description=standing.phase_text(short=True) or "starting",
            completed=0 if owed is None else self._pages - owed,
        )
        lines = (standing.amounts(), standing.rates(), standing.faults())
        self._counts.plain = "\n".join(f"  {line}" for line in lines if line)
