"""Random sequences of placements with injected answers, and a model of each page; run inside the other build."""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import json
import random
import sys
from typing import Any

from injection import Injector
from memory_kinds import make, write_other
from pagecore import Bitmap, Feature, Mover, OutOfMemoryError, PlaceResult, RegisterMode, Userfaultfd
from uffd_helpers import address_of, is_readable, page

MISSING, POISON = -1, -2
SIZES = {"anonymous": 1200, "shared": 96, "huge": 10, "huge_shared": 10}


class Model:
    """One region, its planes, and what every page must hold."""

    def __init__(self, kind: str, seed: int, injector: Injector, *, protected: bool) -> None:
        self.random = random.Random(f"{kind}{seed}")
        self.injector = injector
        self.uffd = Userfaultfd(Feature.WP_UNPOPULATED if protected else Feature(0))
        size = SIZES[kind]
        self.backing = make(kind, size + (552 if kind == "anonymous" else 0))
        self.shared = self.backing.other is not None and not protected
        mode = RegisterMode.MISSING | (RegisterMode.WP if protected else 0) | (RegisterMode.MINOR if self.shared else 0)
        memory: Any = memoryview(self.backing.mapping)
        if kind == "anonymous":
            # A whole block is inside, with 40 pages before it.
            start = (-address_of(self.backing.mapping) - 40 * 4096) % (2 << 20)
            memory = memory[start : start + size * 4096]
        self.region = self.uffd.register(memory, page_size=self.backing.page_size, mode=mode)
        self.size = self.region.size
        self.claimed, self.received = Bitmap(self.size), Bitmap(self.size)
        self.excluded = Bitmap(self.size)
        self.pages = [MISSING] * self.size
        self.cache = [MISSING] * self.size
        # Placed, said to be present by an injected answer, and then its CONTINUE failed: not dealt with.
        self.maybe: dict[int, set[int]] = {}
        self.mover = Mover(2)
        self.value = 0
        self.seen: dict[str, int] = {}
        self.injector.generate(seed, 300, self.region.page_size)

    def step(self) -> None:
        first = self.random.randrange(self.size)
        count = self.random.randrange(1, min(self.size - first, max(self.size // 6, 2)) + 1)
        self.value = self.value % 250 + 1
        planes: dict[str, Any] = {"claimed": self.claimed, "received": self.received, "excluded": self.excluded}
        data = page(self.value, 1, self.region.page_size) * count
        choice = self.random.choice(["place", "place", "zeros", "move", "poison", "continue", "protect", "unprotect"])
        if self.value == 1 and self.size > 1000:
            # While nothing is there: a whole block is in it.
            data = page(1, 1, self.region.page_size) * 700
            self.tell(0, 700, 1, lambda: self.mover.place(self.region, 0, data, **planes))
        elif choice == "place":
            self.tell(first, count, self.value, lambda: self.region.place(first, data, **planes))
        elif choice == "move":
            self.tell(first, count, self.value, lambda: self.mover.place(self.region, first, data, **planes))
        elif choice == "zeros":
            self.tell(first, count, 0, lambda: self.region.place_zeros(first, count, **planes))
        elif choice == "poison" and self.random.random() < 0.2:
            count = min(count, 3)
            planes = {"claimed": self.claimed, "excluded": self.excluded}
            self.tell(first, count, POISON, lambda: self.region.poison(first, count, **planes))
        elif choice == "continue" and self.shared:
            self.fill_cache(first, count)
            self.tell(first, count, None, lambda: self.region.place_continue(first, count, **planes))
        elif choice in {"protect", "unprotect"} and self.region.modes & RegisterMode.WP:
            result = getattr(self.region, choice)(first, count)
            assert result.placed == count, result

    def fill_cache(self, first: int, count: int) -> None:
        """Write some pages that nobody has placed behind the mapping."""
        for index in range(first, first + count):
            if self.pages[index] == MISSING and not self.claimed.test(index) and self.random.random() < 0.7:
                self.cache[index] = self.value
                write_other(self.backing, index, page(self.value, 1, self.region.page_size))

    def tell(self, first: int, count: int, value: int | None, call: Any) -> None:
        """Make a call, and follow what it says it did."""
        before = [self.claimed.test(index) for index in range(first, first + count)]
        blocked = [self.excluded.test(index) for index in range(first, first + count)]
        settled = count
        try:
            result: PlaceResult | None = call()
        except OutOfMemoryError as error:
            result = None
            settled = (error.address - self.region.address) // self.region.page_size - first
            self.note("out of memory", 1)
        if result is not None:
            names = ("placed", "present", "zeroed", "deferred", "gone", "absent", "excluded")
            tally = {name: getattr(result, name) for name in names}
            assert sum(tally.values()) == count, result
            assert result.gone == 0, result
            assert result.moved <= result.placed
            self.note("moved", result.moved)
            for name, number in tally.items():
                self.note(name, number)
            settled = count - result.deferred
        for offset in range(count):
            index = first + offset
            held = before[offset] or (blocked[offset] and value != POISON)
            if offset >= settled or held:
                # Not ours, or not dealt with: as it was, and no claim of ours is left.
                if offset == settled and self.shared and value is not None and self.pages[index] == MISSING:
                    self.maybe.setdefault(index, set()).add(value)
                assert self.claimed.test(index) == before[offset], (index, value)
                continue
            absent = value is None and self.pages[index] == MISSING and self.cache[index] == MISSING
            assert self.claimed.test(index) == (not absent), (index, value)
            if self.pages[index] == MISSING and not absent:
                if value is None or (self.cache[index] != MISSING and value != POISON):
                    self.pages[index] = self.cache[index]
                else:
                    self.pages[index] = value
            if value == POISON:
                assert self.excluded.test(index)
            elif not absent:
                assert self.received.test(index)

    def note(self, what: str, number: int) -> None:
        self.seen[what] = self.seen.get(what, 0) + number

    def finish(self) -> None:
        """Place what is left, with answers injected until the end, and look at every page."""
        for _ in range(10_000):
            first = self.claimed.find_clear()
            if first is None:
                break
            arguments = (first, page(77, 1, self.region.page_size))
            place = functools.partial(self.region.place, claimed=self.claimed, received=self.received)
            self.tell(first, 1, 77, functools.partial(place, *arguments))
        assert self.claimed.count() == self.size
        self.injector.generate(0, 0)
        self.look()
        self.uffd.close()

    def look(self) -> None:
        size = self.region.page_size
        for index, value in enumerate(self.pages):
            address = self.region.address + index * size
            if value == MISSING:
                continue
            assert is_readable(address) == (value != POISON), (index, value)
            if value != POISON:
                found = ctypes.string_at(address, size)
                possible = {value} | self.maybe.get(index, set())
                assert any(found == bytes([one]) * size for one in possible), (index, possible, found[0], found[-1])


def main() -> None:
    kind, seed, sequences, steps = sys.argv[1], *map(int, sys.argv[2:5])
    faulthandler.dump_traceback_later(40, exit=True)
    injector = Injector()
    seen: dict[str, int] = {}
    for number in range(sequences):
        protected = number % 3 == 2
        model = Model(kind, seed + number, injector, protected=protected)
        for _ in range(steps):
            model.step()
        model.look()
        model.finish()
        model.backing.close()
        for name, count in model.seen.items():
            seen[name] = seen.get(name, 0) + count
        del model  # and with it its huge pages
    print(json.dumps({"calls": injector.calls, "injected": injector.injected, **seen}))
