"""The two sides of a migration, each by itself: send and receive, as a program and as a person meet them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

import pagecore
from concurrency import Worker, wait_until
from fault_relay import Fault, Relay
from link_rig import Authority, hello
from pagecore.cli import cli
from pagecore.cli.receive_view import ReceiveView
from pagecore.errors import ProtocolError
from pagecore.migrate import Options, Outcome, Receive, Send, Terms
from pagecore.migrate.agreement import describe, learn
from pagecore.migrate.transport import has_zstd
from pagecore.wire import FrameType

pytestmark = pytest.mark.timeout(60)

GUEST = Options(size=16 << 20, guest="process", seed=11, vcpus=2, free_share=0.25, dirty_rate=64 << 20, timeout=40.0)
# Long enough phases to hit.
SLOW = dataclasses.replace(GUEST, bandwidth=8 << 20, precopy_rounds=1, reconnect_timeout=0.5)

Event = dict[str, Any]


class Sides:
    """A receiver and a sender in this process's children, and what they said.

    ``act(sides, event)`` is called with each event of either side.
    """

    def __init__(
        self,
        address: str,
        options: Options = GUEST,
        *,
        sending: Terms | None = None,
        receiving: Terms | None = None,
        act: Callable[[Sides, Event], None] = lambda sides, event: None,
        via: Callable[[str], str] = str,
        **limits: Any,
    ) -> None:
        self.events: list[Event] = []
        self._act = act
        self._via = via
        self._done: set[str] = set()
        self._sending = sending
        self._lock = threading.Lock()
        own = Options(timeout=40.0, reconnect_timeout=options.reconnect_timeout)
        self.receive = Receive(own, address, receiving, self._event, **limits)
        self._receiver = Worker(self.receive.run)
        wait_until(lambda: self.named("listening") or self._receiver.done(), "the receiver")
        self.send: Send
        if self.named("listening"):
            self.dial(options)

    def dial(self, options: Options) -> None:
        """Send a guest."""
        self.send = Send(options, self._via(self.named("listening")[0]["address"]), self._sending, self._event)
        self._sender = Worker(self.send.run)

    def _event(self, event: Event) -> None:
        with self._lock:
            self.events.append(event)
        self._act(self, event)

    def named(self, name: str, role: str | None = None) -> list[Event]:
        with self._lock:
            return [event for event in self.events if event["event"] == name and role in (None, event["role"])]

    def once(self, name: str) -> bool:
        """True the first time that it is asked."""
        first = name not in self._done
        self._done.add(name)
        return first

    def sent(self) -> Outcome:
        outcome: Outcome = self._sender.value(45)
        return outcome

    def received(self) -> Outcome:
        outcome: Outcome = self._receiver.value(45)
        return outcome


def phase(event: Event, name: str, role: str) -> bool:
    return event["event"] == "phase" and event["phase"] == name and event["role"] == role


def check_verified(sides: Sides) -> None:
    """Both sides know that all of it is right, and agree about it."""
    sent, received = sides.sent(), sides.received()
    for outcome in (sent, received):
        assert outcome.verified, outcome.message
        assert outcome.exit_code == 0
        assert outcome.guest_at == "destination"
    assert sent.message == received.message
    assert sent.report["source"]["pages_sent"] == received.report["source"]["pages_sent"] > 0
    assert received.report["source"]["audit_wrong"] == 0


# ------------------------------------------------------------------------------------------------- what is agreed


def test_the_guest_is_the_senders() -> None:
    own = Options(duplicates="strict", timeout=7.0, size=32 << 20)
    learned = learn(own, hello(regions={0: 4096}, details=describe(GUEST, "process")), 16 << 20)
    assert learned == dataclasses.replace(
        own, size=16 << 20, guest="process", seed=11, vcpus=2, free_share=0.25, dirty_rate=64 << 20
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"page_size": 8192}, "page_size"),
        ({"regions": {0: 4096, 1: 1}}, "regions"),
        ({"regions": {1: 4096}}, "regions"),
        ({"regions": {0: 8192}}, "size: a guest of 32M; this side takes 16M at most"),
        ({"regions": {0: 4095}}, "guest: size 16773120 is not a multiple"),
        ({"guest": "xen"}, "guest"),
        ({"guest": None}, "guest"),
        ({"seed": 1 << 63}, "guest: seed"),
        ({"seed": True}, "seed: True is of the wrong type"),
        ({"seed": "1"}, "seed"),
        ({"vcpus": 9}, "guest: vcpus 9"),
        ({"free_share": 2.0}, "guest: free share"),
        ({"free_share": None}, "free_share"),
        ({"dirty_rate": 1}, "guest: dirty rate"),
        ({"settle_steps": -1}, "guest: settle steps"),
        ({"postcopy": 1}, "postcopy"),
        ({"emulate_qemu": None}, "emulate_qemu"),
        ({"emulate_qemu": True, "postcopy": False}, "guest: --emulate-qemu"),
    ],
)
def test_a_guest_that_cannot_be_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    details = describe(GUEST, "process")
    members = {"page_size": 4096, "regions": {0: 4096}}
    details.update((name, value) for name, value in changes.items() if name not in members)
    members.update((name, value) for name, value in changes.items() if name in members)
    given = hello(**members, details=details)
    with pytest.raises(ProtocolError, match=named):
        learn(Options(), given, 16 << 20)
    missing = hello(regions={0: 4096}, details={"guest": "kvm"})
    with pytest.raises(ProtocolError, match="seed: is missing"):
        learn(Options(), missing, None)


# ---------------------------------------------------------------------------------------------------- as a program


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.mark.kernel
def test_a_guest_goes_over_a_unix_socket(tmp_path: Path) -> None:
    sides = Sides(f"unix:{tmp_path}/link")
    check_verified(sides)
    assert sides.receive.options.seed == GUEST.seed
    assert sides.received().report["pages"] == 4096
    assert sides.received().report["guest"]["kind"] == "process"


@pytest.mark.ci
@pytest.mark.kernel
def test_the_sender_pauses_and_the_receiver_knows(tmp_path: Path) -> None:
    def act(sides: Sides, event: Event) -> None:
        if phase(event, "precopy", "source"):
            sides.send.pause()
        elif event["event"] == "paused" and event["role"] == "destination":
            sides.send.resume()

    sides = Sides(f"unix:{tmp_path}/link", SLOW, act=act)
    check_verified(sides)
    for report in (sides.sent().report, sides.received().report):
        ((began, ended),) = report["pauses"]
        assert ended > began


@pytest.mark.ci
@pytest.mark.kernel
def test_a_guest_goes_over_tls_packed(authority: Authority) -> None:
    sides = Sides("127.0.0.1:0", sending=authority.terms("s", compress="zstd"), receiving=authority.terms("d"))
    check_verified(sides)


@pytest.mark.ci
@pytest.mark.kernel
@pytest.mark.parametrize("guest", ["kvm", "process"])
@pytest.mark.parametrize("way", ["plain", "tls", "tls auto", "plain auto", "plain zstd"])
def test_every_kind_of_guest_goes_every_way(guest: str, way: str, authority: Authority) -> None:
    compress = way.split()[1] if " " in way else "none"
    sending, receiving = Terms(compress=compress), Terms()
    if way.startswith("tls"):
        sending, receiving = authority.terms("s", compress=compress), authority.terms("d")
    options = dataclasses.replace(GUEST, size=32 << 20, guest=guest, dirty_rate=None, precopy_rounds=1)
    check_verified(Sides("127.0.0.1:0", options, sending=sending, receiving=receiving))


@pytest.mark.ci
@pytest.mark.kernel
def test_a_guest_that_is_too_large_is_refused_and_the_receiver_waits_on(tmp_path: Path) -> None:
    sides = Sides(f"unix:{tmp_path}/link", dataclasses.replace(GUEST, size=32 << 20), max_size=16 << 20)
    refused = sides.sent()
    assert refused.exit_code == 1
    assert refused.guest_at == "source"
    assert "size: a guest of 32M; this side takes 16M at most" in refused.message
    assert "one more self-check round" in refused.message
    assert sides.named("refused")
    # Nobody came yet: it ends without a guest.
    sides.receive.interrupt()
    outcome = sides.received()
    assert outcome.exit_code == 130
    assert outcome.message == "interrupted before the switch: no guest was started"


@pytest.mark.ci
@pytest.mark.kernel
def test_a_helper_that_dies_is_a_lost_link_and_the_guest_arrives_all_the_same(authority: Authority) -> None:
    def act(sides: Sides, event: Event) -> None:
        if event["event"] == "running" and sides.once("kill"):
            child = sides.send.pid
            helpers = Path(f"/proc/{child}/task/{child}/children").read_text().split()
            assert len(helpers) == 1
            os.kill(int(helpers[0]), signal.SIGKILL)

    options = dataclasses.replace(SLOW, reconnect_timeout=20.0, bandwidth=16 << 20, dirty_rate=None)
    sides = Sides("127.0.0.1:0", options, sending=authority.terms("s"), receiving=authority.terms("d"), act=act)
    check_verified(sides)
    assert sides.named("link_lost", "source")
    assert sides.named("reconnected", "source")


# ------------------------------------------------------------------------------------------- signals, and death


@pytest.mark.ci
@pytest.mark.kernel
@pytest.mark.parametrize("who", ["source", "destination"])
def test_ctrl_c_on_either_side_before_the_switch_leaves_the_guest_at_the_source(who: str, tmp_path: Path) -> None:
    def act(sides: Sides, event: Event) -> None:
        if phase(event, "precopy", who) and sides.once("press"):
            (sides.send if who == "source" else sides.receive).interrupt()

    sides = Sides(f"unix:{tmp_path}/link", SLOW, act=act)
    sent, received = sides.sent(), sides.received()
    assert sent.guest_at == received.guest_at == "source"
    assert [sent.exit_code, received.exit_code] == ([130, 1] if who == "source" else [1, 130])
    assert "one more self-check round" in sent.message
    assert "the guest was at the source" in received.message


@pytest.mark.ci
@pytest.mark.kernel
@pytest.mark.parametrize("who", ["source", "destination"])
def test_ctrl_c_on_either_side_after_the_switch_serves_until_all_is_there(who: str, tmp_path: Path) -> None:
    def act(sides: Sides, event: Event) -> None:
        if phase(event, "postcopy", "destination") and sides.once("press"):
            (sides.send if who == "source" else sides.receive).interrupt()

    sides = Sides(f"unix:{tmp_path}/link", dataclasses.replace(SLOW, dirty_rate=None), act=act)
    sent, received = sides.sent(), sides.received()
    assert sent.guest_at == received.guest_at == "destination"
    assert [sent.exit_code, received.exit_code] == ([130, 0] if who == "source" else [0, 130])
    for outcome in (sent, received):
        assert outcome.verified, outcome.message


@pytest.mark.ci
@pytest.mark.kernel
@pytest.mark.parametrize(
    ("who", "when", "sender", "receiver"),
    [
        ("source", "precopy", "the source was ended at once; the guest is gone", "the guest was at the source"),
        ("source", "postcopy", "the source was ended at once; the guest is gone", "fail closed (SIGBUS or a wait)"),
        ("destination", "precopy", "one more self-check round", "ended at once; the guest was at the source"),
        ("destination", "postcopy", "fail closed (SIGBUS or a wait)", "ended at once; the guest is gone"),
    ],
)
def test_a_second_ctrl_c_ends_that_side_at_once_and_the_other_says_where_the_guest_is(
    who: str, when: str, sender: str, receiver: str, tmp_path: Path
) -> None:
    def act(sides: Sides, event: Event) -> None:
        if phase(event, when, who) and sides.once("press"):
            one = sides.send if who == "source" else sides.receive
            one.interrupt()
            one.interrupt()

    sides = Sides(f"unix:{tmp_path}/link", dataclasses.replace(SLOW, dirty_rate=None), act=act)
    sent, received = sides.sent(), sides.received()
    assert sender in sent.message
    assert receiver in received.message
    assert [sent.exit_code, received.exit_code] == ([130, 1] if who == "source" else [1, 130])
    if when == "postcopy":
        # It was said, and nobody went on looking for a side that had given up.
        assert "the rest was given up" in (received if who == "source" else sent).message
        assert not sides.named("link_lost")


@pytest.mark.ci
@pytest.mark.kernel
@pytest.mark.parametrize(
    ("lost", "where", "said"),
    [
        (FrameType.COMPLETE, "unknown", "the guest runs at the destination with all of it, or is gone"),
        (FrameType.AUDIT, "destination", "the guest was at the destination, which had all of its memory"),
    ],
)
def test_a_link_that_is_lost_for_good_at_the_end_costs_no_guest_and_the_sender_says_what_it_knows(
    lost: FrameType, where: str, said: str, tmp_path: Path
) -> None:
    with Relay(str(tmp_path)) as relay:
        relay.faults = (Fault("call", to_destination=False, kind=lost, call=relay.cut_for_good),)
        options = dataclasses.replace(GUEST, reconnect_timeout=0.3)
        sides = Sides(f"unix:{tmp_path}/link", options, via=relay)
        sent, received = sides.sent(), sides.received()
    assert (sent.guest_at, sent.exit_code, sent.verified) == (where, 1, False)
    assert said in sent.message
    assert "the link was lost" in sent.message
    assert received.guest_at == "destination"


@pytest.mark.ci
@pytest.mark.kernel
def test_a_receiver_that_dies_while_it_verifies_is_no_verification(tmp_path: Path) -> None:
    def act(sides: Sides, event: Event) -> None:
        if phase(event, "verify", "destination"):
            os.kill(sides.receive.pid, signal.SIGKILL)

    options = dataclasses.replace(GUEST, settle_steps=1 << 20, reconnect_timeout=0.5)
    sides = Sides(f"unix:{tmp_path}/link", options, act=act)
    sent, received = sides.sent(), sides.received()
    assert [sent.exit_code, received.exit_code] == [1, 1]
    assert not sent.verified
    assert "all pages arrived, but the destination did not say what it found" in sent.message
    assert "SIGKILL" in received.message


# -------------------------------------------------------------------------------------------------- as a person


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["send", "--to", "nowhere"], "'nowhere' is neither unix:PATH nor HOST:PORT"),
        (["send", "--to", "10.0.0.1:5"], "10.0.0.1 is refused: the link is neither encrypted nor authenticated"),
        (["receive", "--listen", "0.0.0.0:5"], "--insecure"),
        (["receive", "--listen", "[::]:5"], "--tls-cert, --tls-key and --tls-ca"),
        (["send", "--to", "10.0.0.1:5", "--tls-cert", "x"], "are needed together"),
        (["send", "--to", "unix:/x", "--insecure", *["--tls-cert=x", "--tls-key=x", "--tls-ca=x"]], "leave it out"),
        (["receive", "--listen", "1.1.1.1:5", "--tls-cert=/no", "--tls-key=/no", "--tls-ca=/no"], "No such file"),
        (["send", "--to", "unix:/x", "--size", "5000"], "size 5000"),
        (["send", "--to", "unix:/x", "--compress", "gzip"], "gzip"),
        (["send", "--to", "unix:/x", "--link", "tcp"], "--link"),
        (["receive", "--listen", "unix:/x", "--size", "1G"], "--size"),
        (["receive", "--listen", "unix:/x", "--max-size", "much"], "'much' is not a size"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_started(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())


def test_zstd_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_zstd()
    monkeypatch.setattr("pagecore.cli.roles.has_zstd", lambda: False)
    result = CliRunner().invoke(cli, ["send", "--to", "unix:/x", "--compress", "zstd"])
    assert result.exit_code == 2
    assert f"{sys.executable} -m pip install 'pagecore[zstd]'" in result.output


def test_send_has_the_guests_options_of_migrate_and_receive_has_not() -> None:
    migrate, send, receive = (
        {one.name for one in cli.commands[name].params} for name in ("migrate", "send", "receive")
    )
    assert migrate - send == {"link"}
    assert receive & {"size", "seed", "guest", "vcpus", "hints", "postcopy", "bandwidth"} == set()
    assert {"duplicates", "timeout", "reconnect_timeout", "as_json", "quiet"} <= receive


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(pagecore.__file__).parent.parent), "COLUMNS": "120"}


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "pagecore", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def files(terms: Terms) -> list[str]:
    return ["--tls-cert", str(terms.tls_cert), "--tls-key", str(terms.tls_key), "--tls-ca", str(terms.tls_ca)]


@pytest.mark.ci
@pytest.mark.kernel
def test_what_the_readme_says_of_two_machines_works(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    section = text.partition("## Between two machines")[2].partition("\n## ")[0]
    blocks = "".join(re.findall(r"```console\n(.*?)```", section, re.DOTALL)).replace("\\\n", "")
    lines = [line.partition("$ ")[2] for line in blocks.replace("0.0.0.0:7070", "127.0.0.1:0").splitlines()]
    # One host alone has a name that everybody knows.
    making = "; ".join(line for line in lines if "openssl" in line).replace("there", "localhost")
    subprocess.run(["sh", "-ec", making], cwd=tmp_path, check=True, capture_output=True, timeout=50)
    receive, send = (line.split("pagecore ")[1].split() for line in lines if "--tls-cert" in line)

    def here(words: list[str]) -> list[str]:
        return [
            str(tmp_path / word.replace("there", "localhost")) if ".pem" in word or ".key" in word else word
            for word in words
        ]

    with started(*here(receive)) as receiver:
        assert receiver.stderr is not None
        port = receiver.stderr.readline().rpartition(":")[2].strip()
        words = [word.replace("there:7070", f"localhost:{port}").replace("1G", "16M") for word in here(send)]
        with started(*words) as sender:
            out, errors = sender.communicate(timeout=50)
            assert sender.returncode == 0, out + errors
        assert receiver.wait(50) == 0


@pytest.mark.ci
@pytest.mark.kernel
def test_two_commands_as_two_people_see_them(authority: Authority) -> None:
    with started("receive", "--listen", "127.0.0.1:0", *files(authority.terms("d"))) as receiver:
        assert receiver.stderr is not None
        waiting = receiver.stderr.readline()
        found = re.search(r"waiting for a source at (127\.0\.0\.1:\d+)$", waiting)
        assert found, waiting
        with started("send", "--to", found[1], "--json", "--size", "32M", *files(authority.terms("s"))) as sender:
            out, errors = sender.communicate(timeout=40)
            assert sender.returncode == 0, errors
        report = json.loads(out)
        assert report["verified"] is True
        assert errors.strip() == report["message"]
        out, errors = receiver.communicate(timeout=40)
        assert receiver.returncode == 0, errors
    for said in ("a guest comes: ", "precopy", "switch", "verifying all of the memory"):
        assert said in errors
    for row in ("guest", "memory", "pages sent", "downtime", "fault latency, owed", "placed after the switch"):
        assert re.search(rf"^{row}  +\S", out, re.MULTILINE), row
    assert out.rstrip().splitlines()[-1] == report["message"]


@pytest.mark.ci
@pytest.mark.kernel
def test_two_sides_on_one_machine_meet_where_nobody_else_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "XDG_RUNTIME_DIR", str(tmp_path))
    with started("receive", "--json") as receiver:
        path = wait_until(lambda: list(tmp_path.iterdir()), "the receiver")[0]
        assert path.name == f"pagecore-{os.geteuid()}.sock"
        assert path.stat().st_mode & 0o777 == 0o600
        with started("send", "--json", "--size", "16M") as sender:
            out, errors = sender.communicate(timeout=40)
            assert sender.returncode == 0, out + errors
        out, errors = receiver.communicate(timeout=40)
        assert receiver.returncode == 0, errors
    assert json.loads(out)["verified"] is True


@pytest.mark.parametrize(
    ("address", "terms", "said"),
    [
        ("unix:/run/link", Terms(), ""),
        ("tcp:127.0.0.1:7070", Terms(), "any user of this machine may bring the guest: nothing has to be proved there"),
        ("tcp:[::1]:7070", Terms(), "any user of this machine may bring the guest: nothing has to be proved there"),
        ("tcp:0.0.0.0:7070", Terms(insecure=True), "anybody may bring the guest: nothing has to be proved there"),
        ("tcp:0.0.0.0:7070", Terms("cert", "key", "ca"), ""),
    ],
)
def test_who_may_bring_the_guest_is_said_where_that_is_not_this_user_alone(
    address: str, terms: Terms, said: str
) -> None:
    shown = io.StringIO()
    ReceiveView(Console(file=shown), quiet=False, terms=terms).event({"event": "listening", "address": address})
    lines = [line.partition(" s  ")[2] for line in shown.getvalue().splitlines()]
    assert lines == [f"waiting for a source at {address.removeprefix('tcp:')}", *([said] if said else [])]


def test_a_terminal_obeys_nothing_that_a_source_says() -> None:
    shown = io.StringIO()
    view = ReceiveView(Console(file=shown), quiet=False, terms=Terms())
    view.event({"event": "lost", "role": "destination", "error": "the source failed: \x1b[2J"})
    assert shown.getvalue().endswith("  destination: the source failed: ?[2J\n")


@pytest.mark.ci
@pytest.mark.kernel
def test_a_receiver_ends_on_a_signal(tmp_path: Path) -> None:
    with started("receive", "--listen", f"unix:{tmp_path}/link") as receiver:
        assert receiver.stderr is not None
        assert "waiting" in receiver.stderr.readline()
        receiver.send_signal(signal.SIGTERM)
        out, _ = receiver.communicate(timeout=30)
        assert receiver.returncode == 130
        # No figures of a guest that never came.
        assert out == "interrupted before the switch: no guest was started\n"
    assert not (tmp_path / "link").exists()


@pytest.mark.ci
@pytest.mark.kernel
def test_a_sender_whom_the_receiver_does_not_believe_keeps_its_guest(
    authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stranger = Authority(tmp_path_factory.mktemp("other")).terms("s", tls_ca=authority.path)
    sides = Sides("127.0.0.1:0", sending=stranger, receiving=authority.terms("d"))
    outcome = sides.sent()
    assert outcome.exit_code == 1
    assert outcome.guest_at == "source"
    assert "unknown ca" in outcome.message
    wait_until(lambda: sides.named("refused"), "a word about the stranger")
    assert "certificate is refused" in sides.named("refused")[0]["reason"]
    sides.receive.interrupt()
    assert sides.received().exit_code == 130
