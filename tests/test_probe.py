"""probe(): what it says must be what then happens, and each thing that is missing must name its fix."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pathlib

import pytest

import pagecore.probe
from pagecore import Feature, UffdError, UnsupportedError, Userfaultfd
from pagecore.probe import Item, probe
from uffd_helpers import Child, give_up_privileges

pytestmark = pytest.mark.kernel


def test_report_is_frozen_data():
    report = probe()
    assert report["userfaultfd"].title == "userfaultfd"
    with pytest.raises(KeyError):
        report["no such thing"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.kernel = "9"
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.items[0].available = False
    again = json.loads(json.dumps(report.as_dict()))
    assert [item["key"] for item in again["items"]] == [item.key for item in report.items]
    assert again["usable"] == report.usable
    assert len({item.key for item in report.items}) == len(report.items)


def test_every_item_has_a_reason_and_every_missing_one_a_fix():
    report = probe()
    for item in report.items:
        assert item.why, item
        assert bool(item.remedy) is not item.available, item
    assert set(report.missing) == {item for item in report.items if not item.available}


def test_nothing_stays_open():
    before = os.listdir("/proc/self/fd")
    probe()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("feature", [feature for feature in Feature if feature is not Feature.EVENT_FORK])
def test_features_are_what_the_handshake_then_gives(feature):
    report = probe()
    if report[f"feature.{feature.name}"].available:
        with Userfaultfd(feature) as uffd:
            assert uffd.features == feature
    else:
        with pytest.raises(UnsupportedError):
            Userfaultfd(feature)


def test_ways_in_are_what_the_constructor_then_does():
    report = probe()
    if report["userfaultfd.kernel-faults"].available:
        Userfaultfd(user_mode_only=False).close()
    if report["userfaultfd.user-mode"].available:
        Userfaultfd(user_mode_only=True).close()
    assert report.usable is report["userfaultfd"].available is True


def test_a_user_without_rights_is_told_the_commands():
    if pathlib.Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("every user may here; fix: sysctl -w vm.unprivileged_userfaultfd=0")

    def unprivileged():
        give_up_privileges()
        return probe().as_dict()

    report = Child(unprivileged).value()
    items = {item["key"]: item for item in report["items"]}
    assert report["usable"], "user mode is open to everyone"
    assert items["userfaultfd.device"]["remedy"] == "setfacl -m u:$USER:rw /dev/userfaultfd"
    assert items["userfaultfd.syscall"]["remedy"] == "sysctl -w vm.unprivileged_userfaultfd=1"
    assert items["userfaultfd.kernel-faults"]["remedy"] == "sysctl -w vm.unprivileged_userfaultfd=1"
    assert items["userfaultfd.user-mode"]["available"]
    assert items["feature.EVENT_REMOVE"]["available"]
    assert "start the program as this user" in items["pagemap-scan"]["remedy"]
    assert report["user"] != 0


def test_no_userfaultfd_at_all(monkeypatch):
    def refuse(access):
        raise UffdError(errno.ENOENT if access == "device" else errno.ENOSYS, f"userfaultfd ({access})")

    monkeypatch.setattr(pagecore.probe, "query_access", refuse)
    report = probe()
    assert not report.usable
    assert "CONFIG_USERFAULTFD=y" in report["userfaultfd"].remedy
    assert "6.1" in report["userfaultfd.device"].remedy
    assert report["feature.MOVE"].remedy == "boot Linux 6.8 or newer"


def test_an_old_kernel_is_told_which_one_to_boot(monkeypatch):
    monkeypatch.setattr(pagecore.probe, "query_access", lambda access: (int(Feature.EVENT_REMOVE), 0))
    report = probe()
    assert report.usable
    assert report["feature.WP_ASYNC"].remedy == "boot Linux 6.7 or newer"
    assert report["feature.EVENT_REMOVE"].available


def test_pagemap_scan_finds_the_page_that_was_written():
    assert probe()["pagemap-scan"].available


@pytest.mark.parametrize(
    "rounds",
    [
        [{0, 1, 2, 3}, set(), set()],  # accepts everything, reports nothing
        [{0, 1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}],  # everything is "written", always
        [set(), set(), {2}],
    ],
)
def test_pagemap_scan_that_accepts_and_does_not_work_is_found_out(monkeypatch, rounds):
    answers = iter(rounds)
    monkeypatch.setattr(pagecore.probe, "_written", lambda pagemap, memory: next(answers))
    item = probe()["pagemap-scan"]
    assert not item.available
    assert "when page 2 was written" in item.why
    assert item.remedy == "boot Linux 6.7 or newer"


def test_pagemap_scan_that_is_refused(monkeypatch):
    def refuse(pagemap, memory):
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    monkeypatch.setattr(pagecore.probe, "_written", refuse)
    item = probe()["pagemap-scan"]
    assert (item.available, item.remedy) == (False, "boot Linux 6.7 or newer")


def kvm_items(device: pathlib.Path) -> dict[str, Item]:
    return {item.key: item for item in pagecore.probe._kvm(device)}


def test_kvm_absent(tmp_path):
    items = kvm_items(tmp_path / "kvm")
    assert not any(item.available for item in items.values())
    assert "modprobe kvm" in items["kvm"].remedy
    assert set(items) == {"kvm", "kvm.manual-protect", "kvm.dirty-ring"}


def test_kvm_without_permission(tmp_path):
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(0)
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:2]:
        parent.chmod(0o755)

    def unprivileged():
        give_up_privileges()
        return kvm_items(device)["kvm"].remedy

    assert f"setfacl -m u:$USER:rw {device}" in Child(unprivileged).value()


def test_kvm_that_is_not_kvm(tmp_path):
    device = tmp_path / "kvm"
    device.touch()
    item = kvm_items(device)["kvm"]
    assert (item.available, item.remedy) == (False, "use a host whose KVM works")


def huge_items(root: pathlib.Path) -> dict[str, Item]:
    return {item.key: item for item in pagecore.probe._huge_pages(root)}


def test_huge_pages(tmp_path):
    pool = tmp_path / "hugepages" / "hugepages-2048kB"
    pool.mkdir(parents=True)
    (pool / "nr_hugepages").write_text("16\n")
    (pool / "free_hugepages").write_text("5\n")
    setting = tmp_path / "transparent_hugepage" / "enabled"
    setting.parent.mkdir()
    setting.write_text("always madvise [never]\n")
    items = huge_items(tmp_path)
    assert (items["huge.2M"].available, items["huge.2M"].why) == (True, "5 free of 16")
    assert not items["huge.1G"].available
    assert items["huge.1G"].remedy == "boot with hugepagesz=1G hugepages=1"
    assert not items["huge.transparent"].available
    assert items["huge.transparent"].remedy == f"echo madvise > {setting}"
    setting.write_text("always [madvise] never\n")
    (pool / "free_hugepages").write_text("0\n")
    items = huge_items(tmp_path)
    assert items["huge.transparent"].available
    assert items["huge.2M"].remedy == f"echo 64 > {pool}/nr_hugepages"
