"""Many faults, discards, prefetches and duplicates at once: nobody stuck, no wrong byte.

A few seconds here; ``make soak`` goes on until five million faults were served (PAGECORE_SOAK_FAULTS). A failure names
the seed (PAGECORE_STRESS_SEED) and the round.
"""

import os
import pathlib
import random
import time

import numpy as np
import pytest

from concurrency import SEED, Worker
from cython_build import build
from pagecore import PlacementLoop
from pagecore.page_source import BufferSource
from placement_rig import served
from uffd_helpers import PAGE

pytestmark = [pytest.mark.kernel, pytest.mark.stress]
NPAGES = 48 * 128
TOUCHERS = 8
ROUND_SECONDS = 60
FAULTS = int(os.environ.get("PAGECORE_SOAK_FAULTS", "25000"))


@pytest.fixture(scope="module")
def soak(tmp_path_factory):
    source = pathlib.Path(__file__).with_name("placement_soak.pyx")
    return build(source, tmp_path_factory.mktemp("soak"), headers=True)


@pytest.fixture(scope="module")
def content(soak):
    words = np.empty(NPAGES * PAGE // 8, np.uint64)
    soak.fill(words)
    return words.view(np.uint8)


def one_round(soak, content, kind, seed):
    """Serve a region once, by one kind of source; returns the statistics."""
    chance = random.Random(seed)
    begun, ended = np.zeros(NPAGES, np.uint64), np.zeros(NPAGES, np.uint64)
    over = np.zeros(1, np.uint64)
    options = {
        "push": lambda: (soak.SoakSource(content), {}),
        "pull": lambda: (BufferSource(content), {"threads": 4, "around": chance.choice((1, 16, 64))}),
        "fill": lambda: (BufferSource(content), {"threads": 4, "background": True}),
    }
    source, settings = options[kind]()
    with served(NPAGES) as rig:
        loop = PlacementLoop([rig.region], source, on_lost="stall", name=f"soak-{seed}", **settings).start()
        try:
            base = rig.region.address
            touchers = [
                Worker(soak.touch, base, NPAGES, chance.getrandbits(63), NPAGES, begun, ended) for _ in range(TOUCHERS)
            ]
            others = [Worker(soak.discard, base, NPAGES, chance.getrandbits(63), over, begun, ended) for _ in range(2)]
            others.append(Worker(soak.duplicate, loop, content, chance.getrandbits(63), over))
            for _ in range(8):
                first = chance.randrange(NPAGES - 64)
                loop.prefetch([(first, 64)])
            end = time.monotonic() + ROUND_SECONDS
            stuck = [worker for worker in touchers if not worker.done(max(0.0, end - time.monotonic()))]
            assert not stuck, (
                f"{kind}, seed {seed}: {len(stuck)} threads wait for {loop.stuck()}: {loop.waiter_figures()}"
            )
            over[0] = 1
            for worker in others:
                worker.value()
            for worker in touchers:
                wrong, page = worker.value()
                assert not wrong, f"{kind}, seed {seed}: {wrong} pages with wrong bytes, one of them page {page}"
            assert loop.error is None, f"{kind}, seed {seed}: {loop.error}"
            assert all(total == 0 for _, total in loop.waiter_figures())
        finally:
            over[0] = 1
            loop.stop()
        state = loop.states[0]
        assert state.released.indices().tolist() == np.flatnonzero(ended).tolist(), f"{kind}, seed {seed}"
        under_way = state.claimed.copy()
        under_way.andnot(state.settled())
        assert not under_way.any(), f"{kind}, seed {seed}: claims were left"
        return loop.stats()


def soak_until(soak, content, faults):
    served_faults, number, seen = 0, 0, []
    while served_faults < faults or number < 3:
        kind = ("push", "pull", "fill")[number % 3]
        stats = one_round(soak, content, kind, SEED * 1000 + number)
        served_faults += stats.faults
        number += 1
        seen.append(stats)
        if number % 100 == 0:
            print(f"{served_faults} faults in {number} rounds", flush=True)
    return served_faults, seen


def test_faults_discards_prefetch_and_duplicates_at_once(soak, content):
    faults, seen = soak_until(soak, content, FAULTS)
    assert faults >= FAULTS
    assert sum(stats.duplicates for stats in seen) > 0
    assert sum(stats.dropped for stats in seen) > 0
    assert sum(stats.refilled for stats in seen) > 0
    print(f"{faults} faults in {len(seen)} rounds")


@pytest.mark.ci
@pytest.mark.timeout(1200)
def test_the_same_for_longer(soak, content):
    faults, _ = soak_until(soak, content, max(FAULTS, 300_000))
    assert faults >= 300_000
