"""Page sources that other Cython code implements through the .pxd alone, pulled and pushed, in a placement loop."""

from __future__ import annotations

import pathlib
import struct
from collections.abc import Iterator
from types import ModuleType

import pytest

from concurrency import DEADLINE
from cython_build import build
from pagecore import PlacementLoop, SourceError
from pagecore.page_source import PageSource
from placement_rig import Served, served
from uffd_helpers import PAGE

NPAGES = 40


@pytest.fixture(scope="module")
def consumer(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return build(pathlib.Path(__file__).with_name("page_source_consumer.pyx"), tmp_path_factory.mktemp("consumer"))


@pytest.fixture
def rig() -> Iterator[Served]:
    with served(NPAGES) as rig:
        yield rig


def pulled(page: int) -> bytes:
    return bytes(PAGE) if page % 5 == 4 else struct.pack("<Q", page + 1) * (PAGE // 8)


def test_it_is_fetched_from_python(consumer: ModuleType) -> None:
    source = consumer.PulledSource(NPAGES)
    assert isinstance(source, PageSource)
    assert (source.lanes, source.slow, source.page_size) == (0, False, PAGE)
    runs = source.fetch(2, 9)
    assert [(first, count, data is None) for first, count, data in runs] == [
        (2, 2, False),
        (4, 1, True),
        (5, 4, False),
        (9, 1, True),
        (10, 1, False),
    ]
    assert runs[2][2] == b"".join(pulled(page) for page in range(5, 9))
    source.broken = 7
    with pytest.raises(SourceError, match=r"pages \[7, 8\): the consumer's source: Input/output error"):
        source.fetch(7, 1)


@pytest.mark.kernel
def test_a_loop_pulls_from_it(consumer: ModuleType, rig: Served) -> None:
    """A source that answers for parts of a run is asked for the rest."""
    source = consumer.PulledSource(NPAGES)
    with PlacementLoop([rig.region], source) as loop:
        assert rig.touch(3).value() == pulled(3)
        assert rig.touch(4).value() == pulled(4)
        loop.prefetch([(0, NPAGES)])
        assert loop.wait_settled(DEADLINE)
        assert (loop.stats().placed, loop.stats().zeroed) == (32, 8)
    assert bytes(rig.memory[:]) == b"".join(pulled(page) for page in range(NPAGES))


@pytest.mark.kernel
def test_what_it_cannot_give_is_named(consumer: ModuleType, rig: Served) -> None:
    source = consumer.PulledSource(NPAGES)
    source.broken = 10
    with PlacementLoop([rig.region], source) as loop:
        loop.prefetch([(8, 8)])
        with pytest.raises(SourceError, match="page 10: the consumer's source: Input/output error") as caught:
            loop.wait_settled(DEADLINE)
        assert caught.value.first_page == 10
        assert not loop.states[0].claimed.test(10)


@pytest.mark.kernel
def test_it_is_refused_for_a_region_that_it_does_not_have(consumer: ModuleType, rig: Served) -> None:
    with pytest.raises(ValueError, match="the source has 39 pages for region 0, which has 40"):
        PlacementLoop([rig.region], consumer.PulledSource(NPAGES - 1))


@pytest.mark.kernel
def test_a_loop_is_pushed_from_it(consumer: ModuleType, rig: Served) -> None:
    with PlacementLoop([rig.region], consumer.PushedSource()) as loop:
        assert rig.touch(9).value() == bytes([64]) * PAGE
        loop.prefetch([(0, 9), (10, 30)])
        assert loop.wait_settled(DEADLINE)
        assert loop.stats().placed == NPAGES
    assert bytes(rig.memory[:]) == b"".join(bytes([(7 * page + 1) % 256]) * PAGE for page in range(NPAGES))
