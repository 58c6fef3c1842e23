"""The DirtyLog protocol: whatever records writes to one region of guest memory.

The two forms of a log meet in the base class. A native log overrides ``c_collect_into`` and ``c_rearm``, and
the ``def`` methods here call those with the GIL released. A log in Python overrides ``collect_into`` and
``rearm`` themselves. A tracker calls the ``def`` methods, once for each sync, so it need not know which form
it has.
"""

from libc.errno cimport ENOSYS

from pagecore._bitmap cimport Bitmap
from pagecore._runs cimport count_of, run_of

from pagecore.errors import raise_for_errno


cdef class DirtyLog:
    """DirtyLog(size, *, rearms_at_collect, misses=())\n--\n
    Whatever records writes to one region: KVM's dirty bitmap or ring, PAGEMAP_SCAN, a test's own.

    Subclass it in Python and override :meth:`collect_into` (and :meth:`rearm`), or in Cython and override
    ``c_collect_into`` (and ``c_rearm``). Every subclass calls ``DirtyLog.__init__``.

    Parameters
    ----------
    size : int
        Pages of the region.
    rearms_at_collect : bool
        True if :meth:`collect_into` returns only after the next write to each page that it reported will be
        reported again (design rules S2 and S3). False if :meth:`rearm` does that as a step of its own.
    misses : iterable of str
        The writers that this log cannot see, such as ``"vmm"`` or ``"vhost"``. Each of them has to call
        ``PageTracker.mark`` after it writes, and hints are refused where one does not (rule S12).

    Attributes
    ----------
    size : int
    rearms_at_collect : bool
    misses : frozenset of str

    Raises
    ------
    ValueError
        If `size` is negative.
    TypeError
        If `misses` is one string, or holds something that is no string.
    """

    def __init__(self, size, *, rearms_at_collect, misses=()):
        cdef Py_ssize_t pages = count_of(size, "size")
        if isinstance(misses, str):
            raise TypeError(f"misses is a collection of names, not one name: use {{{misses!r}}}")
        names = frozenset(misses)
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"misses holds {name!r}, which is no name of a writer")
        self.size = pages
        self.rearms_at_collect = bool(rearms_at_collect)
        self.misses = names

    def collect_into(self, Bitmap bitmap not None):
        """Move what was logged into a bitmap.

        Parameters
        ----------
        bitmap : Bitmap
            As many pages as the log. It is private to the caller until this returns and the log is re-armed:
            never the plane that senders drain (rules S2 and S11). Bits are OR-ed into it, none is cleared.

        Returns
        -------
        int
            Pages newly set in `bitmap`.

        Raises
        ------
        ValueError
            If the sizes differ.
        ClosedError
            If the log is closed.
        BusyError
            If another collect, or a re-arm, is under way.
        PeerGoneError
            If the process whose memory it is has ended.
        UnsupportedError
            If the log cannot do it here and now: it is off, or it is that of the process which forked this one.
        UffdError
            If the kernel refused; what it had handed over by then is in `bitmap`.
        NotImplementedError
            If the subclass has neither this method nor its native twin.

        Notes
        -----
        Releases the GIL around the native twin.
        Thread-safe with writers of the log; two collects at once are not. A tracker holds its lock around it.
        Kernel: as the log.
        """
        cdef int newly
        self._check()
        if bitmap.size != self.size:
            raise ValueError(f"bitmap of {bitmap.size} pages does not fit a log of {self.size} pages")
        with nogil:
            newly = self.c_collect_into(bitmap.c_words)
            bitmap.c_words_changed(0, bitmap.size)
        if newly == -ENOSYS:
            raise NotImplementedError(f"{type(self).__name__} has neither collect_into nor c_collect_into")
        if newly < 0:
            self._fail(-newly, "collect_into")
        return newly

    def rearm(self, first, count):
        """Make the log report the next write to each of these pages again.

        Parameters
        ----------
        first, count : int
            The run of pages. A log that may clear only what it reported (KVM, rule S11) narrows it by itself.

        Raises
        ------
        IndexError
            If the run is not inside the log.
        ValueError
            If `count` is negative.
        ClosedError, BusyError, PeerGoneError, UnsupportedError
            As `collect_into`.
        UffdError
            If the kernel refused. What was not re-armed by then may be tried again.
        NotImplementedError
            If the log does not re-arm at collect and has neither this method nor its native twin.

        Notes
        -----
        Releases the GIL around the native twin.
        Thread-safe with writers; not with a collect.
        Kernel: as the log.
        """
        cdef int result
        cdef size_t start, pages
        self._check()
        run_of(first, count, self.size, &start, &pages)
        with nogil:
            result = self.c_rearm(start, pages)
        if result == -ENOSYS:
            raise NotImplementedError(f"{type(self).__name__} has neither rearm nor c_rearm")
        if result < 0:
            self._fail(-result, "rearm")

    def rearm_seen(self, first, count, Bitmap seen not None):
        """Re-arm just these pages: what a tracker that re-arms late calls, a chunk at a time (rule S11).

        A log that goes on reporting a page until it is re-armed (KVM's with manual protect) would lose a write
        if a page were re-armed whose bit nobody has seen, or twice for one sighting: the bits that are 1 are
        those that a collect has handed over and no re-arm has used. By default each run of them goes to
        :meth:`rearm`.

        Parameters
        ----------
        first, count : int
            All bits that are 1 lie in here. `first` is a multiple of 64, and `count` too unless it reaches the
            end of the log.
        seen : Bitmap
            As many pages as the log; only bits of this range may be looked at, and none changed.

        Raises
        ------
        IndexError, ValueError
            If the run is not inside the log, or the sizes differ.
        ClosedError, BusyError, PeerGoneError, UnsupportedError
            As `collect_into`.
        UffdError
            If the kernel refused. Nothing is re-armed then: the tracker calls again before it hands out a page
            of these.

        Notes
        -----
        Releases the GIL around the native twin.
        Thread-safe with writers; not with a collect.
        Kernel: as the log.
        """
        cdef int result
        cdef size_t start, pages
        self._check()
        run_of(first, count, self.size, &start, &pages)
        if seen.size != self.size:
            raise ValueError(f"bitmap of {seen.size} pages does not fit a log of {self.size} pages")
        with nogil:
            result = self.c_rearm_seen(start, pages, seen.c_words + (start >> 6))
        if result == -ENOSYS:
            stop = start + pages
            run = seen.find_set(start)
            while run is not None and run < stop:
                past = seen.find_clear(run)
                past = stop if past is None else min(past, stop)
                self.rearm(run, past - run)
                run = seen.find_set(past)
        elif result < 0:
            self._fail(-result, "rearm_seen")

    def __len__(self):
        return self.size

    def __repr__(self):
        return (
            f"<{type(self).__name__} of {self.size} pages,"
            f" {'re-arms at collect' if self.rearms_at_collect else 're-armed apart'}>"
        )

    cdef int _check(self) except -1:
        return 0

    cdef int _fail(self, int number, str method) except -1:
        raise_for_errno(number, f"{type(self).__name__}.{method}")

    # -ENOSYS says "not overridden"; no log takes it from its kernel interface, which exists once the log
    # does.
    cdef int c_collect_into(self, uint64_t *words) noexcept nogil:
        return -ENOSYS

    cdef int c_rearm(self, size_t first, size_t count) noexcept nogil:
        return 0 if self.rearms_at_collect else -ENOSYS

    cdef int c_rearm_seen(self, size_t first, size_t count, const uint64_t *words) noexcept nogil:
        return -ENOSYS
