"""open_guest: which kind of test guest can be had here, and why."""

from __future__ import annotations

import errno
import mmap
import threading
from typing import Literal

from pagecore._uffd import Userfaultfd
from pagecore.errors import PagecoreError, UnsupportedError
from pagecore.testing import _guest, _machine_state
from pagecore.testing.config import BLOCK_SIZE, GuestConfig
from pagecore.testing.guest import KVM_DEVICE, Guest
from pagecore.testing.logs import LOGS, RING_SIZE

__all__ = ["open_guest"]

TRIAL_SECONDS = 5.0


def _refusal(error: _machine_state.KvmRefusedError, device: str) -> UnsupportedError:
    """What keeps KVM from working here, and what would change it."""
    if error.step == "KVM_CAP_DIRTY_LOG_RING":
        return UnsupportedError("KVM's dirty ring", "Linux 5.11 or newer on x86, or a guest with another dirty_log")
    if error.errno in {errno.ENOENT, errno.ENXIO, errno.ENODEV}:
        remedy = f"{device} is not there: modprobe kvm_intel (kvm_amd); in a VM, switch on nested virtualisation"
    elif error.errno in {errno.EACCES, errno.EPERM}:
        remedy = f"no permission for {device}: sudo usermod -aG kvm $USER, then log in again"
    elif error.errno == errno.ENOSYS:
        remedy = "the guest program is 64-bit x86: run on an x86-64 host"
    else:
        remedy = f"{error.strerror} ({device}): Linux 4.13 or newer with KVM"
    return UnsupportedError("KVM", remedy)


def _try_kvm(device: str) -> None:
    """Run a few steps of the guest on a trial VM, since a /dev/kvm that opens may still not run anything.

    Raises
    ------
    UnsupportedError
        If it does not; the message names what would change that.
    """
    memory = mmap.mmap(-1, BLOCK_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        machine = _guest.Machine(memory, kvm_device=device)
    except _machine_state.KvmRefusedError as error:
        raise _refusal(error, device) from error
    failure: list[Exception] = []

    def run() -> None:
        try:
            while machine.run_vcpu(0):
                pass
        except PagecoreError as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="kvm-trial", daemon=True)
    machine.boot(1, 1 << 31, 8)
    machine.stop_after(16)
    thread.start()
    try:
        machine.resume(TRIAL_SECONDS)
        stopped = machine.wait_stopped(TRIAL_SECONDS)
    except TimeoutError:
        stopped = False
    machine.quit()
    thread.join(TRIAL_SECONDS)
    if failure:
        raise UnsupportedError("KVM", f"a trial guest failed ({failure[0]}): use a host whose KVM runs 64-bit guests")
    if not stopped or thread.is_alive():
        raise UnsupportedError("KVM", "a trial guest did not run: use a host whose KVM runs 64-bit guests")
    counters = machine.counters(0)
    machine.close()
    memory.close()
    if counters["steps"] != 16 or counters["errors"]:
        raise UnsupportedError("KVM", f"a trial guest ran wrong ({counters}): run on another host")


def _kernel_faults_served() -> bool:
    """Whether this user may have a userfaultfd that serves a vCPU's faults, which are the kernel's own."""
    try:
        with Userfaultfd() as uffd:
            return not uffd.user_mode_only
    except (PagecoreError, OSError):
        return False


def _kind_with(kind: str, dirty_log: str) -> str:
    """The kind of guest, or "auto" where the log leaves the choice."""
    if dirty_log == "auto":
        return kind
    able = [name for name, logs in LOGS.items() if dirty_log in logs]
    if not able:
        every = sorted({name for logs in LOGS.values() for name in logs})
        raise ValueError(f"dirty_log {dirty_log!r} is none of auto, {', '.join(every)}")
    if kind == "auto":
        return able[0] if len(able) == 1 else kind
    if kind not in able:
        raise ValueError(f"dirty_log {dirty_log!r} is not for a {kind} guest: it has {', '.join(LOGS[kind])}")
    return kind


def open_guest(
    size: int,
    *,
    kind: Literal["auto", "kvm", "process"] = "auto",
    role: Literal["source", "destination"] = "source",
    seed: int = 0,
    vcpus: int = 1,
    free_share: float = 0.5,
    dirty_rate: float | None = None,
    dirty_log: str = "auto",
    slots: int = 1,
    ring_size: int = RING_SIZE,
    device: str = KVM_DEVICE,
) -> Guest:
    """Make a test guest: under KVM where that works, else as threads of this process.

    Parameters
    ----------
    size : int
        Bytes of memory, a multiple of 2 MiB, 16 MiB to 256 GiB.
    kind : {"auto", "kvm", "process"}
        ``"auto"`` takes KVM if a trial guest runs and this user's userfaultfd serves kernel faults.
    role : {"source", "destination"}
        A source gets `Guest.boot`; a destination is filled and given a state. A process guest marks what it wrote
        at the source alone.
    seed : int
        64 bits: all content and every step follow from it.
    vcpus : int
        1 to 16.
    free_share : float
        0.0 to 0.95 of the data pages are free, at the start and about always.
    dirty_rate : float, optional
        Bytes that the guest writes in a second; as fast as it can by default.
    dirty_log : {"auto", "get", "clear", "ring", "marks", "pagemap"}
        Which log it keeps of its writes; with ``kind="auto"`` the log decides where only one kind has it. KVM:
        ``get``, the dirty bitmap, which re-arms at collect (the default); ``clear``, the same with manual protection;
        ``ring``, the dirty rings of its vCPUs. Process: ``marks``, bits that the guest's threads set themselves (the
        default). Both: ``pagemap``, the kernel's log of this process's memory, which sees the machine's writes too.
    slots : int
        Memory slots of a KVM guest, 1 to 8, each with a log of its own; none is a multiple of 64 pages.
    ring_size : int
        Bytes of each dirty ring, a power of two from 4096 to 1048576.
    device : str
        Where KVM is.

    Returns
    -------
    Guest
        Not booted and not running.

    Raises
    ------
    UnsupportedError
        If `kind` is ``"kvm"`` and it cannot be had; the message names the fix.
    ValueError
        If an argument is out of bounds.

    Notes
    -----
    Releases the GIL while it tries KVM.
    Thread-safe with everything.
    KVM with Linux 4.13; a process guest needs no kernel interface.
    """
    if kind not in {"auto", "kvm", "process"}:
        raise ValueError(f"kind {kind!r} is none of auto, kvm, process")
    if role not in {"source", "destination"}:
        raise ValueError(f"role {role!r} is none of source, destination")
    config = GuestConfig(size, seed, vcpus, free_share, dirty_rate)
    wanted = _kind_with(kind, dirty_log)
    if slots != 1 and wanted != "kvm":
        raise ValueError(f"{slots} memory slots are for kind='kvm' alone")

    def process(reason: str) -> Guest:
        return Guest(config, kind="process", role=role, reason=reason, dirty_log=dirty_log)

    if wanted == "process":
        return process("it was asked for")
    try:
        _try_kvm(device)
    except UnsupportedError as error:
        if wanted == "kvm":
            raise
        return process(str(error))
    if wanted == "auto" and not _kernel_faults_served():
        reason = (
            "KVM runs, but this user's userfaultfd serves no kernel faults, which is what a vCPU's are:"
            " sudo sysctl vm.unprivileged_userfaultfd=1, or permission for /dev/userfaultfd"
        )
        return process(reason)
    try:
        return Guest(
            config,
            kind="kvm",
            role=role,
            reason=f"{device} ran a trial guest",
            device=device,
            dirty_log=dirty_log,
            slots=slots,
            ring_size=ring_size,
        )
    except _machine_state.KvmRefusedError as error:
        refusal = _refusal(error, device)
        if wanted == "kvm":
            raise refusal from error
        return process(str(refusal))
