from typing import Self, final

from _typeshed import WriteableBuffer

from pagecore._descriptor import Descriptor
from pagecore._region import Region
from pagecore._uffd_types import Feature, MemoryKind, RegisterMode

__all__ = ["Userfaultfd"]

@final
class Userfaultfd(Descriptor):
    # A descriptor that another process opened and sent, or that this one holds by itself. It is the object's from here
    # on, unless this raises; it is made non-blocking and close-on-exec. `features` are read from the kernel.
    @classmethod
    def adopt(cls, fd: int, *, features: Feature | int | None = None) -> Self: ...
    def close(self) -> None: ...
    def register(
        self,
        memory: WriteableBuffer,
        *,
        page_size: int = 4096,
        region_id: int = 0,
        mode: RegisterMode | int = ...,
    ) -> Region: ...
    # By address, in the memory that the descriptor acts on: with an adopted one, that of the process that opened it.
    def register_address(
        self,
        address: int,
        length: int,
        *,
        page_size: int = 4096,
        region_id: int = 0,
        mode: RegisterMode | int = ...,
        kind: MemoryKind | None = None,
    ) -> Region: ...
    # What the opener of an adopted descriptor has registered already: no ioctl, the caller says how it was registered.
    # With `process` (a pid whose /proc/PID/maps may be read) kind and page size are found there and checked.
    def region_at(
        self,
        address: int,
        length: int,
        *,
        page_size: int = 4096,
        region_id: int = 0,
        mode: RegisterMode | int = ...,
        kind: MemoryKind = ...,
        process: int | None = None,
    ) -> Region: ...
    def unregister(self, region: Region) -> None: ...
