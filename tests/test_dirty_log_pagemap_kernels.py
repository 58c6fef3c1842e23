"""PagemapDirtyLog on other kernels and at unlucky moments, by a shim before libc."""

from __future__ import annotations

import pytest

from preload import compiled, run_with

pytestmark = pytest.mark.kernel

PROLOGUE = """
import ctypes, errno, os
import pagecore
from pagecore import Bitmap, PagemapDirtyLog, UffdError, UnsupportedError, Userfaultfd, Feature
from uffd_helpers import PAGE, address_of, anonymous, leaked_mapping, unmap
shim = ctypes.CDLL(os.environ["LD_PRELOAD"].split()[-1])
mode, calls = (ctypes.c_int.in_dll(shim, name) for name in ("scan_mode", "scan_calls"))
def written(log):
    found = Bitmap(log.size)
    assert log.collect_into(found) == found.count()
    return set(found.indices().tolist())
def write(address, *pages):
    for page in pages:
        ctypes.memset(address + page * PAGE, 1, 1)
memory = anonymous(64)
address = address_of(memory)
"""

SCRIPTS = {
    # The scan re-armed what it found and nobody was told: all of it counts as written, and the scan is repeated.
    "interrupted": """
with PagemapDirtyLog(memory) as log:
    write(address, 5, 40)
    mode.value = 1
    assert {5, 40} <= written(log)
    assert written(log) == set()
    write(address, 7)
    assert written(log) == {7}
    mode.value = 1
    write(address, 9)
    log.rearm(8, 4)
    assert written(log) == set()
""",
    "before Linux 6.7": """
mode.value = 2
try:
    PagemapDirtyLog(memory)
except UnsupportedError as error:
    assert str(error) == "PAGEMAP_SCAN is not available: boot Linux 6.7 or newer", error
else:
    raise AssertionError("no error")
""",
    "before Linux 6.11": """
mode.value = 3
address = leaked_mapping(64)
with Userfaultfd(Feature.WP_ASYNC, user_mode_only=True) as uffd:
    with PagemapDirtyLog.of_process(os.getpid(), address, 64 * PAGE, uffd=uffd) as log:
        write(address, 5)
        assert written(log) == {5}
        unmap(address + 9 * PAGE, PAGE)
        write(address, 6)
        assert written(log) == {6}      # the hole cannot be seen
""",
    "a scan that gets nowhere": """
with PagemapDirtyLog(memory) as log:
    mode.value = 4
    try:
        written(log)
    except UffdError as error:
        assert error.errno == errno.EIO
    else:
        raise AssertionError("no error")
""",
    # 3000 runs do not fit into the vector of one scan; one run does.
    "full vectors": """
memory = anonymous(6000)
with PagemapDirtyLog(memory) as log:
    for pages, several in (((7,), False), (tuple(range(0, 6000, 2)), True)):
        write(address_of(memory), *pages)
        before = calls.value
        assert written(log) == set(pages)
        assert (calls.value - before > 1) is several, calls.value - before
""",
}


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    return compiled("scan_shim.c", tmp_path_factory.mktemp("shim"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_answers_of_the_kernel(shim, name):
    run_with(shim, PROLOGUE + SCRIPTS[name])
