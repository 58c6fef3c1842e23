"""Two network namespaces, a link that carries less than the guest writes: precopy alone never ends, postcopy does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pagecore

pytestmark = [pytest.mark.ci, pytest.mark.kernel, pytest.mark.timeout(110)]

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(pagecore.__file__).parent.parent)}
HERE, THERE = "10.231.77.1", "10.231.77.2"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@contextlib.contextmanager
def network(rate: str) -> Iterator[tuple[str, str]]:
    """Two namespaces, joined by a veth pair whose ends send at this rate; their names."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not there: apt-get install iproute2")
    here, there = (f"pagecore-{side}-{os.getpid()}" for side in ("here", "there"))
    with contextlib.ExitStack() as stack:
        for name in (here, there):
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces: run as root ({error.stderr.strip()})")
            stack.callback(ip, "netns", "delete", name)
        ip("link", "add", "veth0", "netns", here, "type", "veth", "peer", "name", "veth0", "netns", there)
        for name, address in ((here, HERE), (there, THERE)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")
            bucket = ["qdisc", "add", "dev", "veth0", "root", "tbf", "rate", rate, "burst", "1mb", "latency", "50ms"]
            subprocess.run(["tc", "-n", name, *bucket], check=True, capture_output=True, timeout=20)
        yield here, there


@contextlib.contextmanager
def started(namespace: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "pagecore", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def migrate(rate: str, *options: str) -> dict[str, Any]:
    """A guest from the one namespace to the other: what the sender reports."""
    with network(rate) as (here, there), started(there, "receive", "--listen", f"{THERE}:0", "--insecure") as receiver:
        assert receiver.stderr is not None
        waiting = receiver.stderr.readline()
        port = waiting.rpartition(":")[2].strip()
        assert port.isdigit(), waiting + receiver.stderr.read()
        with started(here, "send", "--to", f"{THERE}:{port}", "--insecure", "--json", *options) as sender:
            sent, said = sender.communicate(timeout=100)
            _, heard = receiver.communicate(timeout=20)
            assert sender.returncode == receiver.returncode == 0, said + heard
    report: dict[str, Any] = json.loads(sent)
    return report


def test_a_guest_that_outruns_the_link_arrives_through_postcopy() -> None:
    report = migrate("800mbit", "--size", "1G", "--dirty-rate", "flat", "--vcpus", "2", "--seed", "3")
    assert report["verified"] is True
    (first,) = report["rounds"]
    assert first["bandwidth"] < 1e8, "the bucket holds the link down"
    assert first["dirty_rate"] > first["bandwidth"], "precopy would never end"
    paused, running = report["switch"]
    assert running - paused < 2.0
