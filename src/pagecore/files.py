"""Files that are whole or not there: written beside the old one, which is then replaced."""

from __future__ import annotations

import errno
import io
import os
import pathlib
import secrets
import select
import stat
import time
from typing import Any, Final

from pagecore.errors import ProtocolError

__all__ = ["read_bounded", "save_figure", "write_whole"]

# How long the reader of a pipe may take to come, and to take something.
PATIENCE: Final = 10.0
LOOK: Final = 0.02
NOBODY_READS: Final = "nobody reads this pipe"


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file, whole or not at all: whoever reads it meanwhile finds the old one.

    Parameters
    ----------
    path : path-like
        Is replaced if it exists.
    data : bytes
        All of its content.

    Raises
    ------
    OSError
        It could not be written; the old file is as it was.

    Notes
    -----
    What a symbolic link points to is replaced, not the link. What is no file (a pipe, /dev/stdout) is written to as it
    is; where nobody takes anything of it for some seconds, that is an error.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        _write_through(path, data)
        return
    target = pathlib.Path(os.path.realpath(path))
    name = target.parent / f".{target.name}.{secrets.token_hex(6)}"
    # With the permissions of any new file, which a temporary one would not have.
    number = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(number, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _write_through(path: str | os.PathLike[str], data: bytes) -> None:
    # Whoever opens a pipe that nobody reads would wait for somebody, and for ever; so would a write to a full one.
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            number = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            break
        except OSError as error:
            if error.errno != errno.ENXIO or not stat.S_ISFIFO(os.stat(path).st_mode):
                raise
            if time.monotonic() >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, NOBODY_READS, os.fspath(path)) from None
            time.sleep(LOOK)
    with os.fdopen(number, "wb", buffering=0) as stream:
        poll = select.poll()
        poll.register(stream, select.POLLOUT)
        left = memoryview(data)
        while left:
            left = left[stream.write(left) or 0 :]
            if left and not poll.poll(PATIENCE * 1000):
                raise TimeoutError(errno.ETIMEDOUT, NOBODY_READS, os.fspath(path))


def save_figure(figure: Any, path: str | os.PathLike[str], *, dpi: float) -> None:
    """Write a picture; see `write_whole`.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    path : path-like
        Its ending names the format; PNG where it has none.
    dpi : float
        Dots an inch.

    Raises
    ------
    ValueError
        There is no such format.
    OSError
        It could not be written; the old file is as it was.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format=os.path.splitext(path)[1][1:] or "png", dpi=dpi)
    write_whole(path, drawn.getvalue())


def read_bounded(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a file of at most so many bytes: a wrong one does not fill the memory.

    Parameters
    ----------
    path : path-like
        The file.
    limit : int
        Bytes.

    Returns
    -------
    bytes
        All of it.

    Raises
    ------
    ProtocolError
        It is longer.
    OSError
        It could not be read.
    """
    with open(path, "rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ProtocolError("length", f"the file has more than {limit} bytes")
    return data
