"""What other kernels answer, given by a shim before libc's ioctl(): the forms of the out field (D6), and rare errors.

The kernel of the test host gives one form of each; older ones leave the field unwritten (before Linux 6.15), and some
errors need a machine without memory. Each case runs in a process of its own, because the shim is preloaded.
"""

from __future__ import annotations

import errno
import json
import os
import pathlib
import subprocess
import sys

import pytest

from preload import preload

pytestmark = pytest.mark.kernel

HERE = pathlib.Path(__file__).parent

PROGRAM = """
import json, sys
from pagecore import Bitmap, UffdError, Userfaultfd
from uffd_helpers import anonymous, page
with Userfaultfd() as uffd:
    memory = anonymous(16)
    region = uffd.register(memory)
    claimed, received = Bitmap(16), Bitmap(16)
    try:
        result = region.place(0, page(10, 8), claimed=claimed, received=received)
        names = ("placed", "present", "deferred", "gone", "peer_gone")
        answer = {name: int(getattr(result, name)) for name in names if getattr(result, name)}
    except UffdError as error:
        answer = {"errno": error.errno, "page": (error.address - region.address) // 4096, "notes": error.__notes__}
    planes = received.count(), claimed.count()
    again = region.place(0, page(10, 8))
    print(json.dumps([answer, planes, again.placed + again.present]))
    assert [memory[i * 4096] for i in range(8)] == list(range(10, 18))
"""


def run(ioctl_shim: str, script: str) -> tuple[dict, tuple[int, int]]:
    paths = [entry for entry in sys.path if entry] + [str(HERE)]
    settings = {"LD_PRELOAD": preload(ioctl_shim), "SCRIPT": script, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    answer, planes, again = json.loads(result.stdout)
    assert again == 8, "whatever the answer was, nothing is lost"
    return answer, tuple(planes)


@pytest.mark.parametrize("out", [f"-{errno.EAGAIN}", "0", "-"], ids=["minus-errno", "zero", "unwritten"])
def test_changing_address_space_in_each_form(ioctl_shim, out):
    assert run(ioctl_shim, f"{errno.EAGAIN}:{out}:0") == ({"deferred": 8}, (0, 0))


def test_partial_results_are_resumed_again_and_again(ioctl_shim):
    script = ",".join(f"{errno.EAGAIN}:{pages * 4096}:{pages}" for pages in (1, 3, 2, 1))
    assert run(ioctl_shim, script) == ({"placed": 8}, (8, 8))


def test_partial_result_and_then_a_changing_address_space(ioctl_shim):
    script = f"{errno.EAGAIN}:{3 * 4096}:3,{errno.EAGAIN}:-:0"
    assert run(ioctl_shim, script) == ({"placed": 3, "deferred": 5}, (3, 3))


@pytest.mark.parametrize("out", ["-", "0", "4096", str(1 << 40)])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOMEM])
def test_the_out_field_of_an_error_is_not_progress(ioctl_shim, number, out):
    answer, planes = run(ioctl_shim, f"{errno.EAGAIN}:8192:2,{number}:{out}:0")
    assert (answer["errno"], answer["page"]) == (number, 2)
    assert "2 of 8 pages" in answer["notes"][0]
    assert planes == (2, 2)


@pytest.mark.parametrize("out", [4096 * 9, 4096 * 8, 100, 1 << 62])
def test_impossible_progress_is_an_error(ioctl_shim, out):
    """D14: numbers of the kernel index memory, so they are checked against the request."""
    answer, planes = run(ioctl_shim, f"{errno.EAGAIN}:{out}:0")
    assert (answer["errno"], answer["page"]) == (errno.EIO, 0)
    assert planes == (0, 0)


def test_eexist_at_once_whatever_the_field_says(ioctl_shim):
    """Page 0 is said to be present, though it is not: it is stepped over, and the rest is placed."""
    answer, planes = run(ioctl_shim, f"{errno.EEXIST}:-{errno.EEXIST}:0")
    assert answer == {"placed": 7, "present": 1}
    assert planes == (8, 8)


def test_enoent_is_narrowed_to_the_page(ioctl_shim):
    """The kernel refuses runs that cross an edge: refused with 8, 4, 2 and 1 pages, one page is gone."""
    answer, planes = run(ioctl_shim, ",".join([f"{errno.ENOENT}:-{errno.ENOENT}:0"] * 4))
    assert answer == {"placed": 7, "gone": 1}
    assert planes == (7, 7)


def test_esrch_midway(ioctl_shim):
    script = f"{errno.EAGAIN}:8192:2,{errno.ESRCH}:-:0"
    assert run(ioctl_shim, script) == ({"placed": 2, "gone": 6, "peer_gone": 1}, (2, 2))


def test_a_source_that_cannot_be_read_for_a_moment(ioctl_shim):
    """EFAULT, and then the source is there: asked once more, and the run goes on."""
    assert run(ioctl_shim, f"{errno.EFAULT}:-{errno.EFAULT}:0") == ({"placed": 8}, (8, 8))


def test_efault_that_the_source_is_not_to_blame_for(ioctl_shim):
    """Newer kernels say EFAULT where memory went away midway: with a source that can be read, the page is gone."""
    answer, planes = run(ioctl_shim, ",".join([f"{errno.EFAULT}:-{errno.EFAULT}:0"] * 2))
    assert answer == {"placed": 7, "gone": 1}
    assert planes == (7, 7)
