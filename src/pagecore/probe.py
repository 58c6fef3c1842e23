"""probe(): what this kernel and this user can do, why not, and the command that changes it.

Everything is tried, never read from a version number: distributions carry features back, containers take them away,
and some interfaces accept a request and then do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import pathlib
import platform
import re
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pagecore._descriptor import open_write_tracker, query_access
from pagecore._uffd_types import FEATURE_SINCE, Feature
from pagecore.errors import PagecoreError, UffdError

__all__ = ["Item", "Report", "probe"]

KVM_DEVICE = pathlib.Path("/dev/kvm")
KERNEL_MM = pathlib.Path("/sys/kernel/mm")

# <linux/kvm.h>; plain numbers, since a struct is needed for none of them.
KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_CHECK_EXTENSION = 0xAE03
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168
KVM_CAP_DIRTY_LOG_RING = 192

# <linux/fs.h> of Linux 6.7; _kernel_abi.h asserts the number and the struct's size.
PAGEMAP_SCAN = 0xC0606610
PM_SCAN_WP_MATCHING = 1 << 0
PM_SCAN_CHECK_WPASYNC = 1 << 1
PAGE_IS_WRITTEN = 1 << 1

PAGE = mmap.PAGESIZE


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that this machine can do or not.

    Attributes
    ----------
    key : str
        Its name for programs, as ``userfaultfd.device``.
    title : str
        Its name for people.
    need : {"required", "optional"}
        Whether pagecore can place a page at all without it.
    available : bool
        Whether it works, for this user, now.
    why : str
        What was found.
    remedy : str
        The command, or the kernel, that would enable it; empty where it is available.
    """

    key: str
    title: str
    need: Literal["required", "optional"]
    available: bool
    why: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What ``probe`` found.

    Attributes
    ----------
    kernel, machine : str
        The kernel's release and the processor architecture.
    user : int
        The effective user id that it holds for.
    items : tuple of Item
        In the order in which they are worth reading.
    """

    kernel: str
    machine: str
    user: int
    items: tuple[Item, ...]

    def __getitem__(self, key: str) -> Item:
        """The item of that key; KeyError where there is none."""
        for item in self.items:
            if item.key == key:
                return item
        raise KeyError(key)

    @property
    def usable(self) -> bool:
        """Whether everything required is there."""
        return all(item.available for item in self.items if item.need == "required")

    @property
    def missing(self) -> tuple[Item, ...]:
        """The items that are not available."""
        return tuple(item for item in self.items if not item.available)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "items": [asdict(item) for item in self.items], "usable": self.usable}


def probe() -> Report:
    """Find out what this kernel and this user can do.

    Returns
    -------
    Report

    Notes
    -----
    Nothing stays open, registered or changed. Holds the GIL in short system calls. Thread-safe. Linux 4.11.
    """
    items = (*_userfaultfd(), _pagemap_scan(), *_kvm(KVM_DEVICE), *_huge_pages(KERNEL_MM))
    return Report(platform.release(), platform.machine(), os.geteuid(), items)


def _userfaultfd() -> Iterator[Item]:
    """The ways in, and what the kernel offers behind the first that is open."""
    found: dict[str, int | UffdError] = {}
    for access in ("device", "syscall", "user-mode"):
        try:
            found[access] = query_access(access)[0]
        except UffdError as error:
            found[access] = error
    offered = next((answer for answer in found.values() if isinstance(answer, int)), None)
    whole = any(isinstance(found[access], int) for access in ("device", "syscall"))

    yield Item(
        "userfaultfd",
        "userfaultfd",
        "required",
        offered is not None,
        "pages can be placed on demand" if offered is not None else "no way in is open",
        "" if offered is not None else _access_remedy("user-mode", found["user-mode"]),
    )
    yield Item(
        "userfaultfd.kernel-faults",
        "userfaultfd for faults of the kernel (KVM, read(2))",
        "optional",
        whole,
        "guests and system calls may touch missing pages" if whole else "user mode only: KVM guests cannot be served",
        "" if whole else _access_remedy("syscall", found["syscall"]),
    )
    titles = {
        "device": "userfaultfd through /dev/userfaultfd",
        "syscall": "userfaultfd through the system call",
        "user-mode": "userfaultfd in user mode only",
    }
    for access, answer in found.items():
        good = isinstance(answer, int)
        why = "open to this user" if good else os.strerror(getattr(answer, "errno", 0) or 0)
        remedy = "" if good else _access_remedy(access, answer)
        yield Item(f"userfaultfd.{access}", titles[access], "optional", good, why, remedy)
    for feature in Feature:
        good = offered is not None and bool(offered & feature)
        need: Literal["required", "optional"] = "required" if feature is Feature.EVENT_REMOVE else "optional"
        why = "the kernel offers it" if good else "the kernel does not offer it"
        remedy = "" if good else f"boot Linux {FEATURE_SINCE[feature]} or newer"
        yield Item(f"feature.{feature.name}", f"userfaultfd feature {feature.name}", need, good, why, remedy)


def _access_remedy(access: str, answer: int | UffdError) -> str:
    """The command for a way in that is closed."""
    number = answer.errno if isinstance(answer, UffdError) else 0
    if number == errno.ENOSYS:
        return "boot a kernel built with CONFIG_USERFAULTFD=y"
    if access == "device":
        if number in {errno.ENOENT, errno.ENXIO, errno.ENODEV}:
            return "boot Linux 6.1 or newer; in a container, pass the device in"
        return "setfacl -m u:$USER:rw /dev/userfaultfd"
    if access == "user-mode":
        return "boot Linux 5.11 or newer" if number == errno.EINVAL else "allow userfaultfd in the seccomp profile"
    return "sysctl -w vm.unprivileged_userfaultfd=1"


def _pagemap_scan() -> Item:
    """Whether PAGEMAP_SCAN really reports the one page that is written, and nothing else.

    Asked by errno it looks fine where it is not: a range that is not armed is "all written", or silently none.
    """
    title = "PAGEMAP_SCAN, writes tracked by the kernel"
    memory = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for index in range(4):
        memory[index * PAGE] = 1
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, open_write_tracker(memory))
            pagemap = stack.enter_context(open("/proc/self/pagemap", "rb", buffering=0))
            rounds = [_written(pagemap.fileno(), memory)]
            rounds.append(_written(pagemap.fileno(), memory))
            memory[2 * PAGE] = 2
            rounds.append(_written(pagemap.fileno(), memory))
    except (PagecoreError, OSError) as error:
        remedy = "boot Linux 6.7 or newer"
        if isinstance(error, PermissionError) and not isinstance(error, UffdError):
            # /proc/self belongs to root in a process that changed its user ids after it started.
            remedy = "start the program as this user, instead of changing user ids in it"
        return Item("pagemap-scan", title, "optional", False, str(error), remedy)
    if rounds == [{0, 1, 2, 3}, set(), {2}]:
        return Item("pagemap-scan", title, "optional", True, "a page that was written was found, and no other")
    why = f"of pages 0 to 3 it found {rounds[0]}, then {rounds[1]}, and {rounds[2]} when page 2 was written"
    return Item("pagemap-scan", title, "optional", False, why, "boot Linux 6.7 or newer")


def _written(pagemap: int, memory: mmap.mmap) -> set[int]:
    """The pages written since the last call, which arms them again."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    regions = (ctypes.c_uint64 * (3 * 8))()
    flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC
    vector = (ctypes.addressof(regions), 8, 0)
    masks = (0, PAGE_IS_WRITTEN, 0, PAGE_IS_WRITTEN)
    argument = struct.pack("=12Q", 96, flags, start, start + len(memory), 0, *vector, *masks)
    count = fcntl.ioctl(pagemap, PAGEMAP_SCAN, bytearray(argument))
    pages: set[int] = set()
    for index in range(count):
        first, last = regions[3 * index], regions[3 * index + 1]
        pages.update(range((first - start) // PAGE, (last - start) // PAGE))
    return pages


def _kvm(device: pathlib.Path) -> Iterator[Item]:
    """The device, a VM made and dropped again, and the dirty-log capabilities."""
    capabilities = (
        ("kvm.manual-protect", "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, "5.2"),
        ("kvm.dirty-ring", "KVM_CAP_DIRTY_LOG_RING", KVM_CAP_DIRTY_LOG_RING, "5.11"),
    )
    try:
        with contextlib.ExitStack() as stack:
            fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            version = fcntl.ioctl(fd, KVM_GET_API_VERSION, 0)
            os.close(fcntl.ioctl(fd, KVM_CREATE_VM, 0))
            values = {key: fcntl.ioctl(fd, KVM_CHECK_EXTENSION, number) for key, _, number, _ in capabilities}
    except OSError as error:
        remedy = _kvm_remedy(device, error.errno)
        yield Item("kvm", "KVM virtual machines", "optional", False, str(error), remedy)
        for key, name, _, _ in capabilities:
            yield Item(key, name, "optional", False, "KVM is not available", remedy)
        return
    yield Item("kvm", "KVM virtual machines", "optional", True, f"API version {version}, a VM could be made")
    for key, name, _, since in capabilities:
        value = values[key]
        why = f"{value} bytes of ring at most" if "ring" in key else f"modes {value:#x}"
        if value > 0:
            yield Item(key, name, "optional", True, why)
        else:
            yield Item(
                key, name, "optional", False, "this KVM does not offer it", f"boot Linux {since} or newer on x86"
            )


def _kvm_remedy(device: pathlib.Path, number: int | None) -> str:
    if number in {errno.EACCES, errno.EPERM}:
        return f"usermod -aG kvm $USER (and log in again), or setfacl -m u:$USER:rw {device}"
    if number in {errno.ENOENT, errno.ENXIO, errno.ENODEV}:
        return "modprobe kvm_intel || modprobe kvm_amd; in a VM, enable nested virtualisation on its host"
    return "use a host whose KVM works"


def _huge_pages(root: pathlib.Path) -> Iterator[Item]:
    """What transparent huge pages are set to, and the pools of hugetlb."""
    setting = _read(root / "transparent_hugepage" / "enabled")
    chosen = re.search(r"\[(\w+)\]", setting)
    good = chosen is not None and chosen[1] in {"always", "madvise"}
    yield Item(
        "huge.transparent",
        "transparent huge pages",
        "optional",
        good,
        f"set to {chosen[1]}" if chosen else "this kernel has none",
        "" if good else f"echo madvise > {root}/transparent_hugepage/enabled",
    )
    for key, size, kilobytes, some in (("huge.2M", "2 MiB", 2048, 64), ("huge.1G", "1 GiB", 1 << 20, 1)):
        pool = root / "hugepages" / f"hugepages-{kilobytes}kB"
        total, free = (_read(pool / name) for name in ("nr_hugepages", "free_hugepages"))
        good = free.isdigit() and int(free) > 0
        boot = f"boot with hugepagesz={size[0]}{size[2]} hugepages={some}"
        remedy = f"echo {some} > {pool}/nr_hugepages" if total else boot
        why = f"{free} free of {total}" if total else "this machine has no such pool"
        yield Item(key, f"hugetlb pages of {size}", "optional", good, why, "" if good else remedy)


def _read(path: pathlib.Path) -> str:
    """A small file of sysfs, or nothing."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
