"""The bitmap benchmark: each operation beside its peers, with what it must reach and what it aims at."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagecore._bitmap import Bitmap
from pagecore.bench import _floor
from pagecore.bench.rounds import Cache, Contender, measure, ratio

COLD, WARM = 28, 20


@dataclass(frozen=True)
class Pattern:
    """2**bits pages, of which a share is set: at random, or in runs of 64 to 4096 pages."""

    bits: int
    density: float
    clustered: bool = False

    def __str__(self) -> str:
        return f"2^{self.bits} {'clustered' if self.clustered else 'uniform'} {self.density:.4g}"

    @property
    def pages(self) -> int:
        """Pages."""
        return 1 << self.bits

    def bitmap(self, seed: int) -> Bitmap:
        """A bitmap of this pattern; not to be changed."""
        key = (self, seed)
        if key not in _made:
            if len(_made) >= KEPT:
                _made.pop(next(iter(_made)))
            _made[key] = draw(self, seed)
        return _made[key]


KEPT = 4
_made: dict[tuple[Pattern, int], Bitmap] = {}


def draw(pattern: Pattern, seed: int) -> Bitmap:
    """Pages at random."""
    rng = np.random.default_rng([seed, pattern.bits, int(pattern.density * 1e6), pattern.clustered])
    bitmap = Bitmap(pattern.pages)
    if pattern.clustered:
        most = pattern.pages // 64
        lengths = rng.integers(64, 4097, most)
        gaps = rng.exponential(2080 * (1 - pattern.density) / pattern.density, most).astype(np.int64) + 1
        ends = np.cumsum(lengths + gaps)
        inside = ends <= pattern.pages
        bitmap.set_runs(np.stack([(ends - lengths)[inside], lengths[inside]], axis=1))
    elif pattern.density == 0.5:
        words = rng.integers(0, 1 << 64, pattern.pages // 64, dtype=np.uint64)
        bitmap = Bitmap.from_bytes(words.tobytes(), pattern.pages)
    else:
        bitmap.set_indices(rng.integers(0, pattern.pages, int(pattern.pages * pattern.density)))
    return bitmap


@dataclass
class Row:
    """One line of the table: how many times as fast as the peer, and what that has to be."""

    operation: str
    case: str
    peer: str
    ratio: float
    must: float | None
    aim: float | None
    nanoseconds: float
    peer_nanoseconds: float
    unit: str = "x"

    @property
    def passed(self) -> bool:
        """Whether the gate holds; True where there is none."""
        if self.must is None:
            return True
        return self.ratio <= self.must if self.unit == "ns more" else self.ratio >= self.must


def address(array: Any) -> int:
    """Where the words of an array or of a Bitmap begin."""
    return int(np.asarray(array).ctypes.data) if isinstance(array, Bitmap) else int(array.ctypes.data)


class Suite:
    """All rows; `rounds` paired rounds each, of which the median counts."""

    def __init__(self, rounds: int = 9, scale: int = 0) -> None:
        self.rounds = rounds
        self._scale = scale
        self._cache = Cache() if scale == 0 else Cache(1 << 20)

    def pattern(self, bits: int, density: float, clustered: bool = False) -> Pattern:
        """The pattern, smaller where the whole suite is."""
        return Pattern(bits - self._scale, density, clustered)

    def rows(self, only: str = "") -> Iterator[Row]:
        """The rows of the groups whose name contains `only`."""
        for name in GROUPS:
            if only in name:
                yield from getattr(self, name)()

    def compare(
        self,
        operation: str,
        case: object,
        ours: Contender,
        cold: bool,
        /,
        **peers: tuple[Contender, float | None, float | None],
    ) -> Iterator[Row]:
        """Time ours and the peers together; one row for each peer, given with its must and its aim."""
        contenders = {"pagecore": ours, **{name: peer for name, (peer, _, _) in peers.items()}}
        measure(contenders, self.rounds, self._cache if cold else None)
        for name, (peer, must, aim) in peers.items():
            label = name.replace("_", " ")
            yield Row(operation, str(case), label, ratio(ours, peer), must, aim, ours.median, peer.median)

    # ---- drains

    def _drain(
        self,
        operation: str,
        pattern: Pattern,
        gate: tuple[float | None, float | None],
        cold: bool = True,
        *,
        how: str = "drain_into_owned",
        flat: bool = False,
    ) -> Iterator[Row]:
        content, there = pattern.bitmap(1), pattern.bitmap(2)
        make: Callable[[int], Bitmap] = over_memory if flat else Bitmap
        log, dirty = make(pattern.pages), make(pattern.pages)
        source, dest = np.array(content), np.array(there)
        words, fresh = np.array(content), np.array(there)

        def prepare() -> None:
            put_back(log, content)
            put_back(dirty, there)

        def prepare_peer() -> None:
            words[:] = source
            fresh[:] = dest

        ours = Contender(functools.partial(getattr(log, how), dirty), prepare)
        peer = Contender(functools.partial(_floor.drain, address(words), address(fresh), len(words)), prepare_peer)
        yield from self.compare(operation, pattern, ours, cold, QEMU_like_loop=(peer, *gate))
        assert ours.answer == peer.answer, (ours.answer, peer.answer)

    def drain_shared(self) -> Iterator[Row]:
        """The source is shared, the destination ours: QEMU's case."""
        gates: list[tuple[float, bool, float, float]] = [
            (0.0001, False, 3.2, 5), (0.01, False, 2.3, 3), (0.5, False, 1.2, 1.6),
            (0.0001, True, 2.4, 100), (0.01, True, 2.3, 10), (0.5, True, 0.9, 1.1),
        ]  # fmt: skip
        for density, clustered, must, aim in gates:
            yield from self._drain("drain, source shared", self.pattern(COLD, density, clustered), (must, aim))

    def drain_flat(self) -> Iterator[Row]:
        """The same over memory that others write: no summary. Reported."""
        for density, clustered in ((0.0001, False), (0.01, False), (0.5, False), (0.01, True)):
            pattern = self.pattern(COLD, density, clustered)
            yield from self._drain("drain, from_buffer", pattern, (None, None), flat=True)

    def drain_owned(self) -> Iterator[Row]:
        """Both are ours."""
        for density, must, aim in ((0.01, 4.0, 5.0), (0.5, 2.2, 3.0)):
            pattern = self.pattern(COLD, density)
            yield from self._drain("drain, both owned", pattern, (must, aim), how="drain_owned_into_owned")

    def drain_both_shared(self) -> Iterator[Row]:
        """Both are shared; the peer's destination is not."""
        for density, must, aim in ((0.0001, 3.0, 4.5), (0.01, 1.4, 2.0), (0.5, 0.6, 1.0)):
            yield from self._drain("drain, both shared", self.pattern(COLD, density), (must, aim), how="drain_into")

    def drain_warm(self) -> Iterator[Row]:
        """In the cache."""
        for density, must, aim in ((0.0001, 5.0, 7.0), (0.01, 2.6, 3.0), (0.5, 1.35, 1.6)):
            yield from self._drain("drain, warm", self.pattern(WARM, density), (must, aim), False)

    def drain_threads(self) -> Iterator[Row]:
        """Two threads, a half each, against one thread."""
        for density, must, aim in ((0.0001, 1.45, 1.8), (0.5, 1.35, 1.6)):
            pattern = self.pattern(COLD, density)
            whole = pattern.bitmap(1), pattern.bitmap(2)
            half = pattern.pages // 2
            one = [over_memory(pattern.pages) for _ in whole]
            two = [[over_memory(half) for _ in whole] for _ in range(2)]
            contents = [[part(bitmap, number * half, half) for bitmap in whole] for number in range(2)]

            def restore_one(one: list[Bitmap] = one, whole: tuple[Bitmap, ...] = whole) -> None:
                for bitmap, content in zip(one, whole, strict=True):
                    put_back(bitmap, content)

            def restore_two(two: list[list[Bitmap]] = two, contents: list[list[Bitmap]] = contents) -> None:
                for pair, content in zip(two, contents, strict=True):
                    for bitmap, words in zip(pair, content, strict=True):
                        put_back(bitmap, words)

            with Second(lambda two=two: two[1][0].drain_into_owned(two[1][1])) as second:  # type: ignore[misc]

                def both(two: list[list[Bitmap]] = two, second: Second = second) -> int:
                    second.go()
                    return two[0][0].drain_into_owned(two[0][1]) + second.wait()

                ours = Contender(both, restore_two)
                peer = Contender(functools.partial(one[0].drain_into_owned, one[1]), restore_one)
                yield from self.compare("drain, two threads", pattern, ours, True, one_thread=(peer, must, aim))
            assert ours.answer == peer.answer

    # ---- looking

    def popcount(self) -> Iterator[Row]:
        """Not the kept count: the words are counted."""
        pattern = self.pattern(COLD, 0.5)
        bitmap = pattern.bitmap(1)
        words = address(bitmap), pattern.pages // 64
        ours = Contender(functools.partial(bitmap.count_range, 0, pattern.pages))
        loop = Contender(functools.partial(_floor.count, *words))
        one, four = (Contender(functools.partial(read, *words)) for read in (_floor.read, _floor.read_four))
        numpy = Contender(lambda: int(np.bitwise_count(np.asarray(bitmap)).sum()))
        rows = list(
            self.compare(
                "popcount", pattern, ours, True,
                POPCNT_loop=(loop, 1.1, 1.4), read_1_stream=(one, None, None), read_4_streams=(four, None, None),
                NumPy=(numpy, None, None),
            )
        )  # fmt: skip
        assert ours.answer == loop.answer == numpy.answer
        best = min(rows[1:3], key=lambda row: row.peer_nanoseconds)
        yield rows[0]
        yield Row("popcount", str(pattern), "best read bandwidth", best.ratio, 0.8, 0.95, best.nanoseconds,
                  best.peer_nanoseconds)  # fmt: skip
        yield rows[3]

    def lists(self) -> Iterator[Row]:
        """Indices and runs, into memory that is there already."""
        pattern = self.pattern(COLD, 0.01)
        bitmap = pattern.bitmap(1)
        count = bitmap.count()
        words, size = address(bitmap), pattern.pages
        mine, theirs = np.ones((count + 80, 2), np.int64), np.ones((count + 80, 2), np.int64)
        ours = Contender(functools.partial(_floor.bitmap_indices, bitmap, address(mine), count + 80))
        peer = Contender(functools.partial(_floor.indices, words, size // 64, address(theirs)))
        yield from self.compare("indices", pattern, ours, True, ctz_loop=(peer, 3.0, 4.0))
        assert ours.answer == peer.answer == count
        assert np.array_equal(mine.ravel()[:count], theirs.ravel()[:count])
        ours = Contender(functools.partial(_floor.bitmap_runs, bitmap, address(mine), count + 80))
        peer = Contender(functools.partial(_floor.runs, words, size, address(theirs)))
        yield from self.compare("runs", pattern, ours, True, find_next_pairs=(peer, 2.7, 3.5))
        assert ours.answer == peer.answer
        assert np.array_equal(mine[: ours.answer], theirs[: ours.answer])

    def find(self) -> Iterator[Row]:
        """The next set page from random places."""
        pattern = self.pattern(COLD, 0.01, True)
        bitmap = pattern.bitmap(1)
        starts = np.random.default_rng(6).integers(0, pattern.pages, 20_000)
        ours = Contender(functools.partial(_floor.bitmap_find_many, bitmap, address(starts), len(starts)))
        peer = Contender(
            functools.partial(_floor.find_many, address(bitmap), pattern.pages, address(starts), len(starts))
        )
        yield from self.compare("find_set, summary", pattern, ours, True, flat_find_next=(peer, 20, 50))
        assert ours.answer == peer.answer

    # ---- changing

    def clear(self) -> Iterator[Row]:
        """65,536 free-page hints of 1 to 1024 pages."""
        for density, must, aim in ((0.0001, 3.8, 5.0), (0.01, 2.0, 3.0), (0.5, 2.4, 3.5)):
            pattern = self.pattern(COLD, density)
            rng = np.random.default_rng(3)
            lengths = rng.integers(1, 1025, 65536 >> self._scale)
            runs = np.stack([rng.integers(0, pattern.pages - 1024, len(lengths)), lengths], axis=1)
            content = pattern.bitmap(1)
            bitmap, source, words = Bitmap(pattern.pages), np.array(content), np.array(content)
            ours = Contender(functools.partial(bitmap.clear_runs, runs), functools.partial(put_back, bitmap, content))
            peer = Contender(
                functools.partial(_floor.clear_runs, address(words), address(runs), len(runs)),
                functools.partial(np.copyto, words, source),
            )
            yield from self.compare("clear runs", pattern, ours, True, count_and_clear_loop=(peer, must, aim))
            assert ours.answer == peer.answer

    def batch(self) -> Iterator[Row]:
        """A million random pages."""
        pattern = self.pattern(COLD, 0.0001)
        pages = np.random.default_rng(5).integers(0, pattern.pages, 1_000_000 >> self._scale)
        bitmap, words = Bitmap(pattern.pages), np.zeros(pattern.pages // 64, np.uint64)
        ours = Contender(functools.partial(bitmap.set_indices, pages), bitmap.reset)
        peer = Contender(
            functools.partial(_floor.set_indices, address(words), pattern.pages, address(pages), len(pages)),
            functools.partial(words.fill, 0),
        )
        peers: dict[str, tuple[Contender, float | None, float | None]] = {"plain_C_with_prefetch": (peer, 0.75, 0.9)}
        bitarray = optional("bitarray", "bitarray")
        if bitarray is not None:
            other = bitarray(pattern.pages)
            listed = pages.tolist()
            peers["bitarray"] = (
                Contender(lambda: other.__setitem__(listed, 1), lambda: other.setall(0)), 2.3, 5.0,
            )  # fmt: skip
        roaring = optional("pyroaring", "BitMap")
        if roaring is not None:
            peers["pyroaring"] = (Contender(lambda: roaring(pages)), None, None)
        yield from self.compare("set 1 M pages", pattern, ours, True, **peers)
        assert ours.answer == peer.answer
        # An empty summary is the worst case for a setter: nearly every page has a line to mark.
        bare = Bitmap(pattern.pages, summary=False)
        ours = Contender(functools.partial(bare.set_indices, pages), bare.reset)
        peer = Contender(peer.call, peer.prepare)
        yield from self.compare("set 1 M, no summary", pattern, ours, True, plain_C_with_prefetch=(peer, 0.75, 0.9))
        assert ours.answer == peer.answer

    def algebra(self) -> Iterator[Row]:
        """OR in place and with three operands."""
        pattern = self.pattern(COLD, 0.5)
        left, right = pattern.bitmap(1), pattern.bitmap(2)
        bitmap, out = Bitmap(pattern.pages), Bitmap(pattern.pages)
        pristine, b = np.array(left), np.array(right)
        a, c = np.array(left), np.array(left)
        ours = Contender(functools.partial(bitmap.merge_owned, right), functools.partial(put_back, bitmap, left))
        peer = Contender(
            functools.partial(_floor.or_in_place, address(a), address(b), len(a)),
            functools.partial(np.copyto, a, pristine),
        )
        numpy = Contender(lambda: np.bitwise_or(a, b, out=a), functools.partial(np.copyto, a, pristine))
        yield from self.compare(
            "or in place", pattern, ours, True, plain_loop=(peer, 1.05, 1.25), NumPy=(numpy, None, None)
        )
        a[:] = pristine
        ours = Contender(functools.partial(_floor.bitmap_or_three, left, right, out))
        peer = Contender(functools.partial(_floor.or_three, address(a), address(b), address(c), len(a)))
        numpy = Contender(lambda: np.bitwise_or(a, b, out=c))
        yield from self.compare(
            "or, three operands", pattern, ours, True, plain_loop=(peer, 1.25, 1.5), NumPy=(numpy, None, None)
        )
        assert np.array_equal(np.asarray(out), c)

    # ---- calls from Python

    def single(self) -> Iterator[Row]:
        """One page a call, 20,000 calls."""
        size = 1 << 16
        pages = np.random.default_rng(7).integers(0, size, 20_000).tolist()
        bitmap, empty = Bitmap(size), _floor.Empty()
        other = (optional("bitarray", "bitarray") or bytearray)(size)
        peer_name = "bitarray" if optional("bitarray", "bitarray") else "bytearray"
        for what, call in (("b[i]", get_each), ("b[i] = True", set_each), ("i in b", in_each)):
            ours = Contender(functools.partial(call, bitmap, pages))
            peer = Contender(functools.partial(get_each if call is in_each else call, other, pages))
            gated = peer_name == "bitarray"
            gates = (peer, 1.4 if gated else None, 1.7 if gated else None)
            yield from self.compare(what, "2^16", ours, False, **{peer_name: gates})
        ours = Contender(functools.partial(call_each, bitmap.set, pages))
        nothing = Contender(functools.partial(call_each, empty.nothing, pages))
        (row,) = self.compare(".set(i)", "2^16", ours, False, empty_method=(nothing, None, None))
        extra = (row.nanoseconds - row.peer_nanoseconds) / len(pages)
        yield Row(
            ".set(i)", "2^16", "an empty method", extra, 5.0, 2.0, row.nanoseconds, row.peer_nanoseconds, "ns more"
        )


GROUPS = (
    "drain_shared", "drain_flat", "drain_owned", "drain_both_shared", "drain_warm", "drain_threads",
    "popcount", "lists", "find", "clear", "batch", "algebra", "single",
)  # fmt: skip


def get_each(table: Any, pages: list[int]) -> None:
    for page in pages:
        table[page]


def set_each(table: Any, pages: list[int]) -> None:
    for page in pages:
        table[page] = True


def in_each(table: Any, pages: list[int]) -> None:
    for page in pages:
        page in table  # noqa: B015


def call_each(method: Callable[[int], object], pages: list[int]) -> None:
    for page in pages:
        method(page)


def optional(module: str, name: str) -> Any:
    """A peer's class; None where it is not installed (the extra `bench` brings them all)."""
    try:
        return getattr(__import__(module), name)
    except ImportError:
        return None


def over_memory(pages: int) -> Bitmap:
    """A bitmap over memory that asks for huge pages, as words of ours do."""
    import mmap

    memory = mmap.mmap(-1, max(pages // 8, mmap.PAGESIZE) + (4 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = np.frombuffer(memory, np.uint8)
    start = -view.ctypes.data % (2 << 20)
    return Bitmap.from_buffer(memoryview(memory)[start : start + pages // 8], pages)


def part(bitmap: Bitmap, first: int, count: int) -> Bitmap:
    """Some pages as a bitmap of their own."""
    fresh = Bitmap(count)
    fresh.copy_range(bitmap, first, 0, count)
    return fresh


def put_back(bitmap: Bitmap, content: Bitmap) -> None:
    """Give a bitmap its content again, by its own setters: its summary is then as good as in use."""
    bitmap.reset()
    bitmap.merge(content)


class Second:
    """A thread that waits to run the other half."""

    def __init__(self, call: Callable[[], int]) -> None:
        self._call = call
        self._start, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._answer = 0
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Second:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._start.release()
        self._thread.join(10)

    def _run(self) -> None:
        while self._start.acquire() and not self._ended:
            self._answer = self._call()
            self._done.release()

    def go(self) -> None:
        """Start the other half."""
        self._start.release()

    def wait(self) -> int:
        """Its answer."""
        self._done.acquire()
        return self._answer
