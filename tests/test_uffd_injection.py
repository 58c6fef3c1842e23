"""Answers of the kernel that a test host does not give by itself, at chosen calls and at random; pages are compared."""

from __future__ import annotations

import errno

import pytest

from concurrency import SEED
from injection import KEEP, run
from memory_kinds import KINDS, huge_pool

pytestmark = pytest.mark.kernel

PAGES = """
import errno, json, sys
from injection import Injector
from pagecore import Bitmap, OutOfMemoryError, Userfaultfd
from uffd_helpers import anonymous, page
injector = Injector()
with Userfaultfd() as uffd:
    region = uffd.register(anonymous(16))
    claimed, received = Bitmap(16), Bitmap(16)
    planes = dict(claimed=claimed, received=received)
    injector.script(*json.loads(sys.argv[2]))
    call = {"copy": lambda: region.place(0, page(10, 8), **planes),
            "zero": lambda: region.place_zeros(0, 8, **planes),
            "poison": lambda: region.poison(0, 8, claimed=claimed, excluded=received)}[sys.argv[1]]
    answer = []
    for _ in range(2):
        try:
            answer.append(repr(call()))
        except OutOfMemoryError as error:
            answer.append(["out of memory", (error.address - region.address) // 4096])
        answer.append([claimed.count(), received.count()])
    print(json.dumps([answer, injector.calls, injector.injected]))
"""


def test_other_builds_have_no_shim():
    """The hook is a symbol of the test build alone."""
    import ctypes

    from pagecore import _uffd_ioctl

    with pytest.raises(ValueError, match="undefined symbol"):
        ctypes.c_void_p.in_dll(ctypes.CDLL(_uffd_ioctl.__file__), "pagecore_injected_ioctl")


@pytest.mark.parametrize("operation", ["copy", "zero", "poison"])
def test_partial_results_interrupts_and_shortage(overlay, operation):
    """Two pages, an interrupted call, three pages, no memory; then, called again, the rest."""
    answers = [(errno.EAGAIN, 2, 8192), (errno.EINTR, 0, KEEP), (errno.EAGAIN, 3, 12288), (errno.ENOMEM, 0, 4096)]
    answer, calls, injected = run(overlay, PAGES, operation, str([list(a) for a in answers]))
    assert answer[0] == ["out of memory", 5]
    assert answer[1] == [5, 5]
    name = "zeroed" if operation == "zero" else "placed"
    assert f"{name}=3" in answer[2]
    assert "present=5" in answer[2]
    assert answer[3] == [8, 8]
    assert (calls, injected) == (5, 4)


@pytest.mark.parametrize("out", [KEEP, 0, -errno.EAGAIN])
def test_a_changing_address_space_in_every_form(overlay, out):
    answer, _, _ = run(overlay, PAGES, "zero", str([[errno.EAGAIN, 0, out]]))
    assert "deferred=8" in answer[0]
    assert answer[1] == [0, 0]
    assert "zeroed=8" in answer[2]


UNREADABLE = """
import errno, json, mmap
from injection import KEEP, Injector
from pagecore import Userfaultfd, UffdError
from uffd_helpers import PAGE, PROT_NONE, address_of, anonymous, page, protect
injector = Injector()
source = anonymous(4)
source[:] = page(10, 4)
protect(address_of(source) + 2 * PAGE, PAGE, PROT_NONE)
with Userfaultfd() as uffd:
    region = uffd.register(anonymous(4))
    injector.script((errno.EFAULT, 0, KEEP))
    try:
        print(json.dumps(repr(region.place(0, source))))
    except UffdError as error:
        print(json.dumps([error.errno, (error.address - region.address) // PAGE, error.__notes__[0]]))
"""


def test_each_page_of_the_source_has_its_own_second_try(overlay):
    """D12: a page that was out for a moment says nothing of a later one, which cannot be read at all."""
    number, at, note = run(overlay, UNREADABLE)
    assert (number, at) == (errno.EFAULT, 2)
    assert "2 of 4 pages" in note


@pytest.mark.parametrize("kind", KINDS)
def test_random_answers_lose_nothing(overlay, kind):
    """Every call may be cut short, refused, deferred or interrupted; the model says what each page holds."""
    with huge_pool(24 if kind.startswith("huge") else 0):
        program = "import injection_model; injection_model.main()"
        seen = run(overlay, program, kind, SEED, 12, 30)
    assert seen["injected"] > seen["calls"] / 5
    always = ("placed", "zeroed", "present", "deferred")
    often = ("excluded", "out of memory", *(("absent",) if kind == "shared" else ("moved",)))
    for name in always if kind.startswith("huge") else always + often:
        assert seen[name] > 0, f"{name} never happened: {seen}"
