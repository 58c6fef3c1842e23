"""Where pages come from: the protocol and the sources that ship with pagecore."""

from __future__ import annotations

from pagecore.page_source._buffer import BufferSource
from pagecore.page_source._callable import CallableSource
from pagecore.page_source._file import FileSource
from pagecore.page_source._memfd import MemfdSource
from pagecore.page_source._protocol import PageSource
from pagecore.page_source._socket import SocketSource

__all__ = ["BufferSource", "CallableSource", "FileSource", "MemfdSource", "PageSource", "SocketSource"]
