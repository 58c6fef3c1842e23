"""A destination that runs out of memory, before the switch and after it."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from migrate_rig import Run
from pagecore.migrate.progress import Cancelled, reason_of

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(60)]

SMALL: dict[str, Any] = {"size": 16 << 20, "dirty_rate": None, "precopy_rounds": 1}
AT_THE_SOURCE = "; the guest was at the source and passed one more self-check round"


@pytest.fixture
def refuse(ioctl_shim: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has calls of both sides fail with ENOMEM: NAME:first:calls of each kind. The source makes none of them."""

    def refuse(*rules: str) -> None:
        monkeypatch.setenv("LD_PRELOAD", ioctl_shim)
        names = [rule.split(":", 1) for rule in rules]
        monkeypatch.setenv("REFUSE", ",".join(f"{name}:{errno.ENOMEM}:{which}" for name, which in names))

    return refuse


@pytest.mark.parametrize("guest", ["process", pytest.param("kvm", marks=pytest.mark.ci)])
def test_a_shortage_that_passes_harms_nobody(guest: str, refuse: Any) -> None:
    refuse("copy:3:100", "zero:0:20")
    run = Run(**SMALL, guest=guest, duplicates="strict")
    assert run.outcome.verified, run.outcome.message
    assert run.placement["shortages"] >= 100
    assert run.placement["twice"] == run.placement["duplicates"] == 0


@pytest.mark.ci
def test_a_shortage_that_lasts_is_the_error_over_all_links(refuse: Any) -> None:
    # The source, whose pages nobody takes, may be the first to lose patience; another link brings no memory.
    refuse("copy:5:0")
    run = Run(**SMALL, guest="process", stall_timeout=1.0)
    what = "placing pages, tried for 1 s: Cannot allocate memory"
    assert run.outcome.exit_code == 1
    assert run.outcome.guest_at == "gone"
    assert run.outcome.message.startswith(f"failed: [Errno 12] {what}; the guest is gone: ")
    assert run.named("lost", "destination")[0]["kind"] == "OutOfMemoryError"
    assert what in run.named("failed", "source")[0]["error"]
    assert len(run.named("link_lost", "source")) <= 1
    assert not run.named("self_check")
    assert run.seconds < 12


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        pytest.param("register:0:0", "UFFDIO_REGISTER on ", marks=pytest.mark.ci),
        ("discard:0:0", "discarding "),
    ],
    ids=["register", "discard"],
)
def test_a_shortage_at_the_switch_leaves_the_guest_at_the_source(rule: str, what: str, refuse: Any) -> None:
    refuse(rule)
    run = Run(**SMALL, guest="process")
    assert run.outcome.exit_code == 1
    assert run.outcome.message.startswith(f"failed: [Errno 12] {what}")
    assert run.outcome.message.endswith(f": Cannot allocate memory{AT_THE_SOURCE}")
    assert not run.named("running")


def test_no_memory_for_the_guest_is_said_before_it_is_moved() -> None:
    def act(run: Run, event: dict[str, Any]) -> None:
        if event["event"] == "listening":
            pid = run.migration.pids["destination"]
            used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
            resource.prlimit(pid, resource.RLIMIT_AS, (used + (32 << 20),) * 2)

    run = Run(act, size=64 << 20, guest="process")
    assert run.outcome.exit_code == 1
    assert (
        run.outcome.message == f"failed: [Errno 12] 64 MiB of memory for a guest: Cannot allocate memory{AT_THE_SOURCE}"
    )


def test_an_error_without_a_word_is_named() -> None:
    assert reason_of(MemoryError()) == "MemoryError"
    assert reason_of(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))) == "[Errno 12] Cannot allocate memory"
    assert reason_of(Cancelled()) == ""
