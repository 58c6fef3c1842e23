"""A migration by two forked children that imported everything as root and then gave up their ids."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from typing import Any

from pagecore.migrate import Options
from pagecore.migrate.child import main
from pagecore.migrate.outcome import Side, judge

NOBODY = 65534


def start(role: str) -> tuple[int, Any, Any]:
    """Fork one side; returns its process id and both pipes."""
    command_end, commands = os.pipe()
    reports, report_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(command_end, 0)
        os.dup2(report_end, 1)
        os.closerange(3, 64)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        os.write(2, f"{role}: uid {os.getuid()}\n".encode())
        os._exit(main(role))
    os.close(command_end)
    os.close(report_end)
    return pid, os.fdopen(commands, "w", buffering=1), os.fdopen(reports)


def run(size: int) -> int:
    os.dup2(1, 2)
    directory = tempfile.mkdtemp(prefix="pagecore-")
    os.chmod(directory, 0o777)
    options = Options(size=size, timeout=40.0)
    configuration = {"options": options.to_json(), "session": "of-nobody"}
    started = {role: start(role) for role in ("destination", "source")}
    sides = {role: Side(role) for role in started}

    def follow(role: str) -> None:
        for line in started[role][2]:
            event = json.loads(line)
            sides[role].take(event)
            if event["event"] == "listening":
                print(json.dumps({**configuration, "address": event["address"]}), file=started["source"][1])

    threads = [threading.Thread(target=follow, args=(role,)) for role in started]
    for thread in threads:
        thread.start()
    print(json.dumps({**configuration, "address": f"unix:{directory}/link"}), file=started["destination"][1])
    for thread in threads:
        thread.join()
    for role, (pid, _, _) in started.items():
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        sides[role].take({"event": "ended", "role": role, "status": status})
    outcome = judge(options, sides["source"], sides["destination"], 0)
    guest = outcome.report.get("guest", {})
    print(f"guest {guest.get('kind')} ({guest.get('reason')})")
    print(f"user mode only {outcome.report['destination'].get('user_mode_only')}")
    print(outcome.message)
    os.rmdir(directory)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1])))
