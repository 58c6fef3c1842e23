from typing import Literal, NamedTuple, final

from pagecore._write_traps import WriteTraps

__all__ = ["SnapshotProgress", "SnapshotTraps"]

class SnapshotProgress(NamedTuple):
    saved: int
    size: int
    populated: int
    faults: int
    held: bool

@final
class SnapshotTraps(WriteTraps):
    def plan(self, sink: memoryview | None, file: int) -> None: ...
    def save_all(self) -> None: ...
    def cancel(self) -> None: ...
    def wait(self, seconds: float) -> bool: ...
    def check(self) -> None: ...
    @property
    def state(self) -> Literal["running", "complete", "failed", "cancelled"]: ...
    @property
    def progress(self) -> SnapshotProgress: ...
