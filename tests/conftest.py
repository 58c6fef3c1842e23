"""Fixtures that several test files share, and the rule that nothing skips where nothing has to."""

from __future__ import annotations

import mmap
import os
import pathlib
from collections.abc import Callable, Iterator

import pytest

from cython_build import build
from injection import build_overlay
from pagecore import Feature, Region, UnsupportedError, Userfaultfd
from preload import compiled
from uffd_helpers import anonymous

# Nothing here multiplies matrices: in each of the many processes that the tests start, numpy would start a thread for
# each processor, and they spin at first.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def door(tmp_path_factory):
    """The test door into the placement loop, compiled once a session."""
    source = pathlib.Path(__file__).with_name("placement_door.pyx")
    return build(source, tmp_path_factory.mktemp("door"), headers=True)


@pytest.fixture(scope="session")
def native_sources(tmp_path_factory):
    """Page sources of somebody else's Cython code, compiled once a session."""
    return build(pathlib.Path(__file__).with_name("page_source_consumer.pyx"), tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def overlay(tmp_path_factory):
    """A build whose userfaultfd calls are answered by a test first, compiled once a session."""
    return build_overlay(tmp_path_factory.mktemp("injected"))


@pytest.fixture(scope="session")
def ioctl_shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Preloaded, it answers as other kernels do, and machines without memory; see its head."""
    return compiled("ioctl_shim.c", tmp_path_factory.mktemp("shim"))


@pytest.fixture
def open_uffd() -> Iterator[Callable[..., Userfaultfd]]:
    """Opens descriptors and closes them at the end, which lets every waiter of a failed test go."""
    opened: list[Userfaultfd] = []

    def open_one(features: int = 0, *, user_mode_only: bool | None = False) -> Userfaultfd:
        try:
            opened.append(Userfaultfd(features, user_mode_only=user_mode_only))
        except UnsupportedError as error:
            pytest.skip(str(error))
        return opened[-1]

    yield open_one
    for uffd in opened:
        uffd.close()


@pytest.fixture
def uffd(open_uffd: Callable[..., Userfaultfd]) -> Userfaultfd:
    """A descriptor with EVENT_REMOVE that delivers the kernel's own faults too."""
    return open_uffd(Feature.EVENT_REMOVE)


@pytest.fixture
def memory() -> mmap.mmap:
    """16 missing pages of private anonymous memory."""
    return anonymous(16)


@pytest.fixture
def region(uffd: Userfaultfd, memory: mmap.mmap) -> Region:
    """The 16 pages, registered."""
    return uffd.register(memory)


def pytest_terminal_summary(terminalreporter):
    """With PAGECORE_NO_SKIP=1 a skipped test fails the run: where nothing has to skip, a skip hides something."""
    skipped = terminalreporter.stats.get("skipped", [])
    if os.environ.get("PAGECORE_NO_SKIP") == "1" and skipped:
        terminalreporter.write_line(f"{len(skipped)} skipped, and PAGECORE_NO_SKIP=1 allows none", red=True)


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if os.environ.get("PAGECORE_NO_SKIP") == "1" and skipped and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
