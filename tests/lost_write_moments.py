"""The moments of a run: places between two steps of a loop, and what is to happen at which."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

from pagecore import Bitmap, DirtyLog

WATCHED = {
    0x4010AE42: "KVM_GET_DIRTY_LOG",
    0xC018AEC0: "KVM_CLEAR_DIRTY_LOG",
    0xAEC7: "KVM_RESET_DIRTY_RINGS",
    0xC0606610: "PAGEMAP_SCAN",
    0xC018AA06: "UFFDIO_WRITEPROTECT",
}
Action = tuple[str, int]
Plan = dict[int, list[Action]]


class Moments:
    """Counts the moments of a run, and does at each what the plan has for it."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        # Within a native call, which may hold a lock.
        self.in_call = False
        self.error: BaseException | None = None
        self._plan: Plan = {}
        self._act: Callable[[Action], None] | None = None
        self._number_type = ctypes.c_ulong * len(WATCHED)
        self._watched = self._number_type(*WATCHED)
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_ulong, ctypes.c_int)(self._at_ioctl)
        watch = ctypes.CDLL(None).watch
        watch.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        watch(self._watched, len(WATCHED), ctypes.cast(self._callback, ctypes.c_void_p))

    def _at_ioctl(self, request: int, done: int) -> None:
        # What is raised here would end in nobody's hands.
        self.in_call = True
        try:
            self(f"{'after' if done else 'before'} {WATCHED[request]}")
        except BaseException as error:
            self.error = error
        self.in_call = False

    @contextlib.contextmanager
    def running(self, plan: Plan, act: Callable[[Action], None]) -> Iterator[None]:
        """From here to the end of the block moments count."""
        self.labels, self.error = [], None
        self._plan, self._act = plan, act
        try:
            yield
        finally:
            self._act = None
        if self.error is not None:
            raise self.error

    @contextlib.contextmanager
    def none(self) -> Iterator[None]:
        """To the end of the block there are no moments."""
        act, self._act = self._act, None
        try:
            yield
        finally:
            self._act = act

    def __call__(self, label: str) -> None:
        act = self._act
        if act is None:
            return
        actions = self._plan.get(len(self.labels), ())
        self.labels.append(label)
        # What an action does has no moments: it is one.
        with self.none():
            for action in actions:
                act(action)


class Watched(DirtyLog):
    """A log with moments around its steps."""

    def __init__(self, log: DirtyLog, moments: Moments, *, rearms_at_collect: bool | None = None) -> None:
        super().__init__(
            log.size,
            rearms_at_collect=log.rearms_at_collect if rearms_at_collect is None else rearms_at_collect,
            misses=log.misses,
        )
        self.log = log
        self.moments = moments

    def collect_into(self, bitmap: Bitmap) -> int:
        self.moments("before the collect")
        newly = self.log.collect_into(bitmap)
        self.moments("after the collect")
        return newly

    def rearm(self, first: int, count: int) -> None:
        self.moments("before the re-arm")
        self.log.rearm(first, count)
        self.moments("after the re-arm")

    def rearm_seen(self, first: int, count: int, seen: Bitmap) -> None:
        self.moments("before the re-arm of a chunk")
        self.log.rearm_seen(first, count, seen)
        self.moments("after the re-arm of a chunk")
