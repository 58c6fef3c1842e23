"""give_way and let_by: bulk threads behind those that somebody waits for."""

import threading

from libc.stdint cimport uint64_t

cdef extern from "_turns.h" nogil:
    void pagecore_give_way()
    void pagecore_let_by(uint64_t *not_before)

# Of each thread: `not_before`, once it has had to wait long.
_mine = threading.local()


def give_way():
    """give_way()
    --

    Have the calling thread run behind the others of its processor from now on: it moves what nobody waits for.

    Raises the niceness of this thread alone, by 10.

    Notes
    -----
    Releases the GIL: no.
    Thread-safe with everything.
    Needs no privilege, and cannot be taken back without one.
    """
    pagecore_give_way()


def let_by():
    """let_by()
    --

    Let run who was woken on this processor meanwhile; for a bulk thread, between two pieces of at most 256 KiB.

    The kernel alone may leave a woken thread waiting until its next tick, of 4 ms at 250 Hz.

    Notes
    -----
    Releases the GIL. Where another thread then keeps the processor for longer than a millisecond, this thread's
    calls of the next 100 ms do nothing: beside threads that never sleep the caller would get next to nothing otherwise.
    Thread-safe with everything.
    Needs no privilege.
    """
    cdef uint64_t known = getattr(_mine, "not_before", 0)
    cdef uint64_t not_before = known
    with nogil:
        pagecore_let_by(&not_before)
    if not_before != known:
        _mine.not_before = not_before
