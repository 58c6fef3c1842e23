"""Many pages are given back at once, and by kernels that cannot, one run after another."""

from __future__ import annotations

import errno
import mmap
import subprocess
import sys

import numpy as np
import pytest

from pagecore import Bitmap, discard_pages

PAGE = 4096
# Twice what one call takes, and some.
NPAGES = 5000
# Makes process_madvise fail with ENOSYS from here on, as before Linux 5.10.
WITHOUT = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 440), (0x06, 0, 0, 0x00050000 | 38), (0x06, 0, 0, 0x7FFF0000)]
filters = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *one) for one in code))
program = ctypes.create_string_buffer(struct.pack("<H6xQ", len(code), ctypes.addressof(filters)))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
assert libc.syscall(440, -1, None, 0, 4, 0) == -1
assert ctypes.get_errno() == 38
"""


def mapped(npages: int) -> mmap.mmap:
    memory = mmap.mmap(-1, npages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    memory[:] = b"x" * (npages * PAGE)
    return memory


def check() -> None:
    """Runs of one page and of many: what is listed reads as zeros, and nothing else."""
    rng = np.random.default_rng(3)
    for chosen in (np.arange(0, NPAGES, 2), np.flatnonzero(rng.random(NPAGES) < 0.9), np.arange(NPAGES), []):
        with mapped(NPAGES) as memory:
            pages = Bitmap(NPAGES)
            pages.set_indices(chosen)
            discard_pages(memory, pages)
            gone = [page for page in range(NPAGES) if memory[page * PAGE] == 0]
            assert gone == pages.indices().tolist()


def test_what_is_listed_is_gone_and_nothing_else() -> None:
    check()


def test_a_kernel_that_takes_one_range_a_call() -> None:
    script = f"import sys; sys.path[:0] = {sys.path!r}\nfrom test_discard_pages import check\n{WITHOUT}\ncheck()"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_what_cannot_be_is_said() -> None:
    with mapped(4) as memory, pytest.raises(ValueError, match="16384 bytes are not 5 pages of 4096"):
        discard_pages(memory, Bitmap(5))
    with pytest.raises(BufferError):
        discard_pages(bytes(PAGE), Bitmap(1))
    pages = Bitmap(3)
    pages.fill()
    with mapped(4) as memory, pytest.raises(OSError) as refused:
        # Not on a page.
        discard_pages(memoryview(memory)[8 : 8 + 3 * PAGE], pages)
    assert refused.value.errno == errno.EINVAL


def test_a_range_that_is_more_than_one_call_takes() -> None:
    # 2 GiB are the most.
    npages = 5 << 18
    with mmap.mmap(-1, npages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        touched = [0, (1 << 19) - 2, (1 << 19) - 1, 1 << 19, (1 << 20) - 1, npages - 1]
        for page in touched:
            memory[page * PAGE] = 1
        pages = Bitmap(npages)
        pages.set_range(1, npages - 1)
        discard_pages(memory, pages)
        assert [page for page in touched if memory[page * PAGE]] == [0]
