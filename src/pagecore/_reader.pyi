from collections.abc import Iterable
from typing import Self

from typing_extensions import disjoint_base

from pagecore._placer import Placer
from pagecore._recorder import Recorder
from pagecore._uffd import Userfaultfd
from pagecore._window import Window

@disjoint_base
class Reader:
    def __new__(cls, uffd: Userfaultfd, placers: Iterable[Placer], window: int, recorder: Recorder) -> Self: ...
    @property
    def uffd(self) -> Userfaultfd: ...
    @property
    def windows(self) -> tuple[Window, ...]: ...
