import enum
from typing import NamedTuple

import numpy
import numpy.typing

from pagecore._tracker_core import TrackerCore

DEFAULT_PAGES: int

class AnswerKind(enum.Enum):
    OWED = 0
    FREE = 1
    SENT = 2
    GONE = 3

class Answer(NamedTuple):
    kind: AnswerKind
    first: int
    count: int  # type: ignore[assignment]  # as every namedtuple with this field

class RegionRuns(NamedTuple):
    region: int
    runs: numpy.typing.NDArray[numpy.int64]

class TrackerSends(TrackerCore):
    def take(
        self,
        max_pages: int | None = None,
        max_runs: int | None = None,
        *,
        max_bytes: int | None = None,
        region: int | None = None,
    ) -> numpy.typing.NDArray[numpy.int64]: ...
    def take_batch(
        self, max_pages: int | None = None, max_runs: int | None = None, *, max_bytes: int | None = None
    ) -> list[RegionRuns]: ...
    def put_back(self, runs: numpy.typing.ArrayLike, *, region: int | None = None) -> None: ...
    def resolve(self, page: int, count: int = 1, again: bool = False, *, region: int | None = None) -> list[Answer]: ...
