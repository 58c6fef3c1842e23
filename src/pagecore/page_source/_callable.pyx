"""CallableSource: pages that a Python function makes, on a thread of its own."""

import logging
import threading

from pagecore.errors import UnsupportedError

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EBADMSG, EIO
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pagecore.page_source._calls cimport Call, Calls
from pagecore.page_source._protocol cimport PageAnswer, PageSource

_logger = logging.getLogger("pagecore.page_source")

cdef class _State:
    """What the thread holds: not the source, which would never be collected then."""

    cdef object function
    cdef Calls calls
    cdef size_t page_size
    cdef object last_error

    def _run(self):
        cdef Call call
        cdef bint open
        while True:
            with nogil:
                open = self.calls.c_take(&call)
            if not open:
                return
            try:
                self._answer(&call)
            except BaseException as error:
                # D12: whatever it raised, its pages stay missing. A KeyboardInterrupt here is nobody's Ctrl-C.
                self.last_error = error
                _logger.warning("the callable failed for pages [%d, %d) of region %d: %r",
                                call.first, call.first + call.count, call.region, error)
                number = getattr(error, "errno", None)
                self._fail(number if isinstance(number, int) and 0 < number < 4096 else EIO, b"the callable raised")

    cdef int _answer(self, const Call *call) except -1:
        cdef Py_buffer view
        cdef uint64_t expected = call.count * self.page_size
        answer = self.function(call.region, call.first, call.count)
        if answer is None:
            with nogil:
                self.calls.c_answer(NULL, 0, NULL)
            return 0
        PyObject_GetBuffer(answer, &view, PyBUF_SIMPLE)
        try:
            if <uint64_t>view.len != expected:
                self.last_error = ValueError(f"{view.len} bytes for {call.count} pages of {self.page_size}")
                self._fail(EBADMSG, b"the callable returned another length")
                return 0
            with nogil:
                self.calls.c_answer(<const uint8_t *>view.buf, 0, NULL)
        finally:
            PyBuffer_Release(&view)
        return 0

    cdef void _fail(self, int number, const char *what) noexcept:
        with nogil:
            self.calls.c_answer(NULL, number, what)


cdef class CallableSource(PageSource):
    """CallableSource(function, *, timeout, page_size=4096, max_pages=16, allow_own_process=False)
    --

    A push source whose pages a Python function makes, on a thread of its own: the slow lane.

    Every fault waits for the interpreter, so this is for prototypes, rare pages and tests. What does not answer in time,
    raises, or returns another length is a `SourceError` of the loop, and its pages fail as `on_lost` says: never zeros.

    Parameters
    ----------
    function : callable
        Called as ``function(region_id, first_page, page_count)``, one call at a time; returns the pages as a bytes-like
        object of exactly ``page_count * page_size`` bytes, or None for zeros.
    timeout : float
        Seconds that one call may take. A call that takes longer cannot be ended: what it returns is dropped, and behind
        it each waiting request fails after as long.
    page_size : int
        Bytes.
    max_pages : int
        The most pages of one call; longer runs are asked for in pieces.
    allow_own_process : bool
        Serve memory of this process too. A thread that touches such memory while it holds the GIL keeps the function
        from running, and is let go by the time-out alone.

    Attributes
    ----------
    last_error : BaseException or None
        What the function raised last.

    Raises
    ------
    TypeError
        The function cannot be called.
    ValueError
        A time-out or size outside its bounds.

    Notes
    -----
    Requests are queued, and answers waited for, without the GIL: time-outs are kept even while Python code elsewhere
    never lets it go. A page that a prefetch has asked for waits for its turn in the queue, also when somebody needs it.
    `close` (or the end of the object) ends the thread. Methods are thread-safe.
    """

    cdef _State _state
    cdef Calls _calls
    cdef object _thread
    cdef readonly double timeout
    cdef readonly uint64_t max_pages
    cdef readonly bint allow_own_process

    def __cinit__(self, function, *, double timeout, page_size=4096, max_pages=16, bint allow_own_process=False):
        if not callable(function):
            raise TypeError(f"{function!r} cannot be called")
        if not 0 < timeout <= 3600:
            raise ValueError(f"timeout {timeout} is outside (0, 3600]")
        if page_size <= 0 or max_pages <= 0 or page_size * max_pages > 1 << 30:
            raise ValueError(f"{max_pages} pages of {page_size} bytes are outside (0, 1 GiB]")
        self.page_size = page_size
        self.max_pages = max_pages
        self.timeout = timeout
        self.allow_own_process = allow_own_process
        self.lanes = 1
        self.bulk_lanes = 0
        self._calls = Calls(<uint64_t>(timeout * 1e9), page_size, max_pages)
        self._state = _State()
        self._state.function = function
        self._state.calls = self._calls
        self._state.page_size = page_size
        self._thread = threading.Thread(target=self._state._run, name="pagecore-callable", daemon=True)
        self._thread.start()

    def __dealloc__(self):
        if self._calls is not None:
            self._calls.c_close()

    def close(self):
        """End the thread, once the call that it is in has ended. Idempotent; in a forked child, nothing to do.

        Raises
        ------
        TimeoutError
            The function is still running after its time-out, or after a second where that is less.
        """
        with nogil:
            self._calls.c_close()
        if self._thread is not threading.current_thread():
            limit = max(self.timeout, 1.0)
            self._thread.join(limit)
            if self._thread.is_alive():
                raise TimeoutError(f"the callable has not returned within {limit:g} s")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()

    @property
    def last_error(self):
        return self._state.last_error

    @property
    def pending(self):
        """int: runs that were asked for and have no answer yet."""
        return self._calls.pending

    def accept(self, regions):
        """Check that this source can serve these regions; a placement loop does so before it starts.

        Parameters
        ----------
        regions : iterable of Region
            What is to be served.

        Raises
        ------
        ValueError
            A region has pages of another size.
        UnsupportedError
            A region is memory of this process, and `allow_own_process` was not given.
        """
        regions = tuple(regions)
        PageSource.accept(self, regions)
        for region in regions:
            if not self.allow_own_process and not region.uffd.remote:
                raise UnsupportedError(
                    "a Python callable for memory of this process",
                    "a thread that waits for a page with the GIL held would keep it from running; "
                    "serve the memory of another process, or pass allow_own_process=True",
                )

    cdef int c_request(self, uint32_t region, uint64_t first, uint64_t count, bint again) noexcept nogil:
        return self._calls.c_ask(region, first, count)

    cdef int c_next(self, int lane, int stop_fd, PageAnswer *answer) noexcept nogil:
        return self._calls.c_next(stop_fd, answer)
