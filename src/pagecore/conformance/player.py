"""The process that plays the guests: ``python -m pagecore.conformance.player``, one fork of it for each row.

A row may hang, or be killed by a SIGBUS: so each has a process of its own, which ends at its deadline and takes its
stuck threads with it. This one has a single thread, which makes the forks safe and cheap.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
from typing import Any

from pagecore.conformance.snapshot import Snapshot
from pagecore.conformance.table import ROWS
from pagecore.conformance.vmm import Failed, HandlerEnded, NotApplicable, Vmm

__all__ = ["main"]

PR_SET_PDEATHSIG = 1

_guests: list[Vmm] = []


def die_with_parent() -> None:
    """No process of the suite outlives it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def play(order: dict[str, Any], snapshot: Snapshot) -> dict[str, str]:
    """Play one row in this process, which ends afterwards."""
    vmm = Vmm(order["socket"], snapshot, order["patience"], may_kill=order["may_kill"])
    # Stuck threads still stand in its memory: it must not be unmapped before the process ends.
    _guests.append(vmm)
    try:
        return {"result": "pass", "seen": ROWS[order["row"]].body(vmm)}
    except Failed as error:
        return {"result": "fail", "seen": str(error)}
    except HandlerEnded:
        return {"result": "ended", "seen": "the handler ended"}
    except NotApplicable as error:
        return {"result": "not applicable", "seen": str(error)}
    except OSError as error:
        return {"result": "hung up", "seen": f"the connection: {error}"}


def _run_forked(order: dict[str, Any], snapshot: Snapshot) -> dict[str, Any]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        # Whatever happens, nothing of the parent's code runs here after this.
        status = 1
        try:
            os.close(reader)
            die_with_parent()
            os.write(writer, json.dumps(play(order, snapshot)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    data = b""
    until = time.monotonic() + order["deadline"]
    while select.select([reader], [], [], max(0.0, until - time.monotonic()))[0]:
        part = os.read(reader, 1 << 16)
        if not part:
            break
        data += part
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    if data:
        result: dict[str, Any] = json.loads(data)
        return result
    return {"result": "killed", "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, "seen": ""}


def main() -> int:
    """Read orders, a JSON object a line; answer each with one."""
    die_with_parent()
    snapshots: dict[str, Snapshot] = {}
    for line in sys.stdin:
        order = json.loads(line)
        path = order["snapshot"]
        if path not in snapshots:
            snapshots[path] = Snapshot(path)
        sys.stdout.write(json.dumps(_run_forked(order, snapshots[path])) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
