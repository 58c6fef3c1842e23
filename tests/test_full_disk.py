"""A disk that is full, or somebody who reads no more: what was there stays, nothing else is left, no guest is lost."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import pagecore
from concurrency import Worker
from pagecore import Bitmap, SavedBitmap, WorkingSet, files
from pagecore.cli import cli
from pagecore.files import write_whole
from pagecore.migrate.plot import draw
from pagecore.migrate.report import load_report, save_report
from report_rig import outcome
from uffd_helpers import Child

pytestmark = pytest.mark.timeout(60)

NO_SPACE = "No space left on device"

WRITERS: dict[str, Callable[[str], object]] = {
    "any file": lambda path: write_whole(path, bytes(100_000)),
    "bitmap": lambda path: SavedBitmap(Bitmap(1 << 16)).save(path),
    "working set": lambda path: WorkingSet([(0, 2 * page, 1) for page in range(1000)]).save(path),
    "report": lambda path: save_report(outcome(), path),
    "picture": lambda path: draw(outcome(), path),
}


def mount_small(directory: Path) -> None:
    """64 KiB of file system, which nobody but this process sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    clone_newns, ms_rec, ms_private = 0x20000, 0x4000, 1 << 18
    for result in (
        libc.unshare(clone_newns),
        libc.mount(b"none", b"/", None, ctypes.c_ulong(ms_rec | ms_private), None),
        libc.mount(b"tmpfs", str(directory).encode(), b"tmpfs", ctypes.c_ulong(0), b"size=64k"),
    ):
        assert result == 0, os.strerror(ctypes.get_errno())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system: run the tests as root")
@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.ci if what == "picture" else ()) for what in WRITERS]
)
def test_the_old_file_stays_and_nothing_else(what: str, tmp_path: Path) -> None:
    def fills() -> tuple[int | None, bytes, list[str]]:
        mount_small(tmp_path)
        path = tmp_path / "file.png"
        path.write_bytes(b"old")
        (tmp_path / "rest").write_bytes(bytes(60 << 10))
        with pytest.raises(OSError, match=NO_SPACE) as caught:
            WRITERS[what](str(path))
        return caught.value.errno, path.read_bytes(), sorted(os.listdir(tmp_path))

    assert Child(fills).value() == (errno.ENOSPC, b"old", ["file.png", "rest"])


# --------------------------------------------------------------------------------------------- what is no file


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A device of our own that is always full: nothing can happen to /dev/full here."""
    path = tmp_path / "full"
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.stat("/dev/full").st_rdev)
    except PermissionError:
        pytest.skip("makes a device: run the tests as root")
    return path


def test_a_device_is_written_to_and_stays_one(full: Path) -> None:
    link = full.with_name("link")
    link.symlink_to(full)
    for path in (full, link):
        with pytest.raises(OSError, match=NO_SPACE):
            write_whole(path, b"data")
    assert full.is_char_device()
    assert link.is_symlink()
    assert sorted(os.listdir(full.parent)) == ["full", "link"]


def test_a_pipe_gets_all_of_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = Worker((tmp_path / "pipe").read_bytes)
    data = os.urandom(300_000)
    write_whole(tmp_path / "pipe", data)
    assert reader.value() == data


@pytest.mark.parametrize("reader", ["none", "one that does not read"])
def test_a_pipe_that_nobody_reads_is_an_error(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if reader != "none" else -1
    with pytest.raises(TimeoutError, match="nobody reads this pipe"):
        write_whole(path, bytes(300_000))
    if number >= 0:
        os.close(number)


def test_a_reader_that_comes_late_gets_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    data = os.urandom(300_000)
    writer = Worker(write_whole, path, data)
    assert not writer.done(0.05)
    assert path.read_bytes() == data
    writer.value()


def test_what_a_link_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


# ------------------------------------------------------------------------------------------------ the command


def command(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    values = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    environment = {**os.environ, "PYTHONPATH": str(Path(pagecore.__file__).parent.parent)}
    line = [sys.executable, "-m", "pagecore", *map(str, arguments)]
    return subprocess.run(line, env=environment, text=True, timeout=50, check=False, **values)


@pytest.mark.ci
@pytest.mark.kernel
def test_what_cannot_be_written_takes_nothing_else_along(full: Path) -> None:
    saved = full.with_name("run.json")
    with open(full, "w") as nowhere:
        done = command("migrate", "--size", "16M", "-q", "--report", saved, stdout=nowhere)
    assert done.returncode == 1
    assert done.stderr == f"pagecore: [Errno 28] {NO_SPACE}\n"
    assert load_report(saved).verified
    picture = full.with_name("run.svg")
    done = command("migrate", "--size", "16M", "-q", "--report", full, "--plot", picture)
    assert done.returncode == 1
    assert done.stderr == f"the report could not be written to {full}: {NO_SPACE}\n"
    assert done.stdout.splitlines()[-1].startswith("verified: ")
    assert picture.read_bytes().startswith(b"<?xml")
    assert full.is_char_device()


@pytest.mark.kernel
@pytest.mark.parametrize("way", ["full", pytest.param("closed", marks=pytest.mark.ci)])
def test_no_guest_is_lost_for_its_progress(way: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    number = writer if way == "closed" else os.open("/dev/full", os.O_WRONLY)
    done = command("migrate", "--size", "16M", stderr=number)
    for one in {writer, number}:
        os.close(one)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith("verified: ")


@pytest.mark.ci
def test_figures_that_cannot_be_written_are_shown(full: Path) -> None:
    picture = full.with_name("full.png")
    picture.symlink_to(full)
    done = CliRunner().invoke(cli, ["bench", "bitmap", "--only", "nothing", "--plot", str(picture)])
    assert done.exit_code == 1
    assert f"the picture could not be written to {picture}: {NO_SPACE}\n" in done.output
    assert "operation" in done.output
    assert "nothing was measured: --only names no group" in done.output
