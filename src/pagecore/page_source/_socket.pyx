"""SocketSource: pages that a peer sends over sockets, on demand and unasked."""

import os
import socket as _socket

from libc.errno cimport EAGAIN, ECONNRESET, EINTR, EPROTO, ETIMEDOUT, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy
from posix.time cimport timespec

from pagecore._move cimport BLOCK_PAGES, Mover
from pagecore._region cimport Region
from pagecore._sync cimport (
    pagecore_monitor,
    pagecore_monitor_destroy,
    pagecore_monitor_enter,
    pagecore_monitor_init,
    pagecore_monitor_leave,
    pagecore_now_ns,
)
from pagecore.page_source._frame cimport (
    PAGECORE_FRAME_AGAIN,
    PAGECORE_FRAME_CHECKSUM,
    PAGECORE_FRAME_END,
    PAGECORE_FRAME_FILL,
    PAGECORE_FRAME_GONE,
    PAGECORE_FRAME_MAGIC,
    PAGECORE_FRAME_PAGES,
    PAGECORE_FRAME_REQUEST,
    PAGECORE_FRAME_SENT,
    PAGECORE_FRAME_ZEROS,
    pagecore_frame,
)
from pagecore.page_source._protocol cimport (
    ANSWER_END,
    ANSWER_FAILED,
    ANSWER_FILL,
    ANSWER_GONE,
    ANSWER_PAGES,
    ANSWER_SENT,
    ANSWER_STOPPED,
    ANSWER_ZEROS,
    PageAnswer,
    PageSource,
)

cdef extern from "<errno.h>" nogil:
    enum: ECANCELED
    enum: ECONNABORTED

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long nfds, int timeout)
    int ppoll(pollfd *fds, unsigned long nfds, const timespec *timeout, const void *mask)
    enum: POLLIN
    enum: POLLOUT

cdef extern from "<sys/socket.h>" nogil:
    ssize_t recv(int fd, void *buffer, size_t length, int flags)
    ssize_t send(int fd, const void *buffer, size_t length, int flags)
    enum: MSG_DONTWAIT
    enum: MSG_NOSIGNAL

cdef struct Lane:
    int fd
    uint8_t *payload
    pagecore_frame frame        # the last header
    size_t header               # bytes of it that have come; all of them until what it announces is told
    size_t begun                # bytes that have come of what follows it
    int stage                   # the stage of the mover that this lane has taken, or -1
    int failure                 # 0, or what ended the stream behind the pages that were told last: -errno

# So long, and no longer, does a lane wait in all for more of a block while it holds pages of it that could be placed.
cdef uint64_t GATHER_NS = 2000000

# A request is 40 bytes. If half of one is in the socket and the peer takes no more for so long, the link is dead.
cdef enum:
    REQUEST_TIMEOUT_MS = 5000


cdef class SocketSource(PageSource):
    """SocketSource(bulk, urgent, *, page_size=4096, max_pages=256, generation=0, round=0)
    --

    A push source over connected stream sockets; frames as in ``pagecore.wire``.

    Parameters
    ----------
    bulk : sequence of socket.socket
        One lane each, from the peer: pages that nobody asked for.
    urgent : socket.socket
        Requests go out on it, answers come in.
    page_size : int
        Bytes.
    max_pages : int
        The most pages of content that one frame may carry; a longer one is refused before memory is touched (W4).
    generation : int
        Frames of any other generation are refused (W6).
    round : int
        The last barrier: a frame of an earlier round is refused (W5).

    Notes
    -----
    Of anonymous memory a block of 2 MiB whose pages follow one another in the frames of a bulk lane is received in a huge
    page, and moved (Linux 6.8). What of it is waited for, for 2 ms in all, does not hold up the rest, which is copied then; and
    while faults come, every frame is placed as it is.
    The descriptors are duplicated: closing the Python sockets does not pull them from under a native thread (D13).
    The native methods do not take the GIL. One thread a lane may call ``c_next``; any thread may call ``c_request``.
    """

    cdef Lane *_lanes
    cdef int _urgent
    cdef pagecore_monitor _sending      # one request frame at a time: frames must not interleave
    cdef bint _ready
    cdef uint32_t _generation
    cdef uint32_t _round
    cdef readonly size_t max_pages
    cdef Mover _mover                   # None: nobody wants whole blocks
    cdef tuple _movable                 # regions
    cdef void **_blocks                 # the same, borrowed
    cdef int _block_count

    def __cinit__(self, bulk, urgent, *, size_t page_size=4096, size_t max_pages=256, uint32_t generation=0,
                  uint32_t round=0):
        cdef int index
        if page_size == 0 or max_pages == 0 or max_pages > (1 << 30) // page_size:
            raise ValueError(f"a frame of {max_pages} pages of {page_size} bytes is outside (0, 1 GiB]")
        sockets = [*bulk, urgent]
        if pagecore_monitor_init(&self._sending) != 0:
            raise MemoryError()
        self._ready = True
        self._urgent = -1
        self.page_size = page_size
        self.max_pages = max_pages
        self._generation = generation
        self._round = round
        self._lanes = <Lane *>calloc(len(sockets), sizeof(Lane))
        if self._lanes == NULL:
            raise MemoryError()
        for index, sock in enumerate(sockets):
            if sock.type != _socket.SOCK_STREAM:
                raise ValueError(f"socket {index} is no stream socket")
            self._lanes[index].stage = -1
            self._lanes[index].fd = os.dup(sock.fileno())
            self.lanes = index + 1
            self._lanes[index].payload = <uint8_t *>malloc(page_size * max_pages)
            if self._lanes[index].payload == NULL:
                raise MemoryError()
        self._urgent = self._lanes[self.lanes - 1].fd
        self.bulk_lanes = self.lanes - 1

    def __dealloc__(self):
        cdef int index
        for index in range(self.lanes):
            free(self._lanes[index].payload)
            os.close(self._lanes[index].fd)
        free(self._lanes)
        free(self._blocks)
        if self._ready:
            pagecore_monitor_destroy(&self._sending)

    cdef int c_request(self, uint32_t region, uint64_t first, uint64_t count, bint again) noexcept nogil:
        cdef pagecore_frame frame
        cdef int status
        frame.magic = PAGECORE_FRAME_MAGIC
        frame.type = PAGECORE_FRAME_REQUEST
        frame.flags = PAGECORE_FRAME_AGAIN if again else 0
        frame.region = <uint16_t>region
        frame.generation = self._generation
        frame.round = self._round
        frame.first = first
        frame.count = count
        frame.length = 0
        frame.checksum = 0
        pagecore_monitor_enter(&self._sending)
        status = _send_frame(self._urgent, &frame)
        pagecore_monitor_leave(&self._sending)
        return status

    def gather(self, Mover mover, regions):
        cdef int index
        cdef Region region
        regions = tuple(regions) if mover is not None else ()
        for region in regions:
            if region is None:
                raise TypeError("a region is None, not a Region")
            if region.page_size != self.page_size or not region.c_movable:
                raise ValueError(f"region {region.id} is not memory that blocks can be moved into")
        self._block_count = 0
        for index in range(self.lanes):
            self._lanes[index].stage = -1           # that was of another mover
        self._movable = regions
        self._mover = mover
        free(self._blocks)
        self._blocks = <void **>calloc(len(self._movable) + 1, sizeof(void *))
        if self._blocks == NULL:
            raise MemoryError()
        self._block_count = len(self._movable)
        for index in range(self._block_count):
            self._blocks[index] = <void *>self._movable[index]

    cdef int c_next(self, int lane, int stop_fd, PageAnswer *answer) noexcept nogil:
        cdef Lane *own = &self._lanes[lane]
        cdef int status
        answer.error = 0
        answer.field = NULL
        answer.data = NULL
        answer.block = 0
        status = _next_header(own, stop_fd, NULL)
        if status == 0:
            status = self._check(&own.frame, answer)
        if status == 0 and lane < self.bulk_lanes and self._begins_block(own, answer):
            return self._gather(own, stop_fd, answer)
        if status == 0 and own.frame.length:
            status = _receive(own.fd, own.payload, own.frame.length, &own.begun, stop_fd, NULL)
            answer.data = own.payload
        if status != 0:
            return _fail(own, answer, status)
        _told(own)
        return answer.kind

    cdef bint _begins_block(self, Lane *own, const PageAnswer *answer) noexcept nogil:
        """Whether this frame is the first part of a block that may be moved, and there is a huge page to receive it in."""
        cdef int index
        if answer.urgent or answer.kind != ANSWER_PAGES or own.frame.flags or answer.count > BLOCK_PAGES:
            return False
        for index in range(self._block_count):
            if (<uint32_t>(<Region>self._blocks[index]).id == answer.region
                    and self._mover.c_can_move(<Region>self._blocks[index], answer.first)):
                if own.stage < 0:
                    own.stage = self._mover.c_take()
                return own.stage >= 0
        return False

    cdef int _gather(self, Lane *own, int stop_fd, PageAnswer *answer) noexcept nogil:
        """Receive frames that continue one another into a stage, until the block is whole, or no more of it comes soon."""
        cdef uint8_t *stage = self._mover.c_stage(own.stage)
        cdef uint64_t waited = 0
        cdef int status
        answer.count = 0
        while True:
            # With nothing to place yet, waiting holds up nobody.
            status = _receive(own.fd, stage + answer.count * self.page_size, own.frame.length, &own.begun, stop_fd,
                              &waited if answer.count else NULL)
            if status == -EAGAIN:
                # Half a frame: it goes on where it would have gone alone.
                memcpy(own.payload, stage + answer.count * self.page_size, own.begun)
            elif status == 0:
                answer.count += own.frame.count
                _told(own)
                if answer.count == BLOCK_PAGES:
                    break
                status = _next_header(own, stop_fd, &waited)
            if status != 0 or not self._continues(own, answer):
                break
        if status == -ECANCELED or answer.count == 0:
            status = _fail(own, answer, status)
            if answer.kind == ANSWER_STOPPED and answer.count:
                own.failure = -ECONNABORTED     # whole frames that nobody will place
            return status
        if status != -EAGAIN:
            own.failure = status        # it is told when these pages have been placed
        answer.data = stage
        if answer.count == BLOCK_PAGES:
            answer.block = 1 + own.stage
            own.stage = -1
        return answer.kind

    cdef bint _continues(self, const Lane *own, const PageAnswer *answer) noexcept nogil:
        cdef PageAnswer following
        return (self._check(&own.frame, &following) == 0 and following.kind == ANSWER_PAGES and own.frame.flags == 0
                and following.region == answer.region and following.first == answer.first + answer.count
                and following.count <= BLOCK_PAGES - answer.count)

    cdef int _check(self, const pagecore_frame *frame, PageAnswer *answer) noexcept nogil:
        """Judge a header before memory is touched for its payload (W4); fill in the answer."""
        answer.region = frame.region
        answer.first = frame.first
        answer.count = frame.count
        answer.kind = _answer_kind(frame.type)
        if frame.magic != PAGECORE_FRAME_MAGIC:
            answer.field = b"magic"
        elif answer.kind == 0:
            answer.field = b"type"
        elif frame.flags and frame.flags != _flag_of(answer.kind):
            answer.field = b"flags"
        elif frame.generation != self._generation:
            answer.field = b"generation"
        elif frame.round < self._round:
            answer.field = b"round"
        elif frame.count == 0 and answer.kind != ANSWER_END:
            answer.field = b"count"
        elif answer.kind == ANSWER_PAGES and frame.count > self.max_pages:
            answer.field = b"count"
        elif frame.length != (frame.count * self.page_size if answer.kind == ANSWER_PAGES else 0):
            answer.field = b"length"
        else:
            return 0
        return -EPROTO


cdef int _answer_kind(uint8_t frame_type) noexcept nogil:
    if frame_type == PAGECORE_FRAME_PAGES:
        return ANSWER_PAGES
    if frame_type == PAGECORE_FRAME_ZEROS:
        return ANSWER_ZEROS
    if frame_type == PAGECORE_FRAME_FILL:
        return ANSWER_FILL
    if frame_type == PAGECORE_FRAME_SENT:
        return ANSWER_SENT
    if frame_type == PAGECORE_FRAME_GONE:
        return ANSWER_GONE
    if frame_type == PAGECORE_FRAME_END:
        return ANSWER_END
    return 0


cdef uint8_t _flag_of(int kind) noexcept nogil:
    # A checksum of pages would not be looked at here: whoever sends one must not believe that it is.
    return PAGECORE_FRAME_CHECKSUM if kind == ANSWER_END else PAGECORE_FRAME_AGAIN


cdef int _fail(Lane *lane, PageAnswer *answer, int status) noexcept nogil:
    if status == -ECANCELED:
        answer.kind = ANSWER_STOPPED
        if lane.header or lane.begun:
            lane.failure = -ECONNABORTED        # for whoever serves from here next: what came of this frame is gone
    else:
        answer.kind = ANSWER_FAILED
        answer.error = -status
        answer.count = 0        # no run, but the stream itself
    return answer.kind


cdef void _told(Lane *lane) noexcept nogil:
    lane.header = lane.begun = 0


cdef int _next_header(Lane *lane, int stop_fd, uint64_t *waited) noexcept nogil:
    """0: `frame` is the next header. As _receive otherwise."""
    if lane.failure != 0:
        return lane.failure
    return _receive(lane.fd, <uint8_t *>&lane.frame, sizeof(pagecore_frame), &lane.header, stop_fd, waited)


cdef int _receive(int fd, uint8_t *buffer, size_t length, size_t *done, int stop_fd, uint64_t *waited) noexcept nogil:
    """Receive until *done, which counts on, is `length`; 0, -ECANCELED when told to stop, or -errno (-ECONNRESET at the end).

    With `waited`, nanoseconds so far without a byte: -EAGAIN once they are more than a lane may wait for a block.
    """
    cdef pollfd waits[2]
    cdef timespec patience
    cdef uint64_t before = 0
    cdef ssize_t got
    while done[0] < length:
        got = recv(fd, buffer + done[0], length - done[0], MSG_DONTWAIT)
        if got > 0:
            done[0] += got
            continue
        if got == 0:
            return -ECONNRESET
        if errno == EINTR:
            continue
        if errno != EAGAIN:
            return -errno
        if waited != NULL:
            if waited[0] >= GATHER_NS:
                return -EAGAIN
            before = pagecore_now_ns()
            patience.tv_sec = 0
            patience.tv_nsec = <long>(GATHER_NS - waited[0])
        waits[0].fd = fd
        waits[0].events = POLLIN
        waits[1].fd = stop_fd
        waits[1].events = POLLIN
        waits[1].revents = 0
        if ppoll(waits, 2, &patience if waited != NULL else NULL, NULL) < 0 and errno != EINTR:
            return -errno
        if waits[1].revents:
            return -ECANCELED
        if waited != NULL:
            waited[0] += pagecore_now_ns() - before
    return 0


cdef int _send_frame(int fd, const pagecore_frame *frame) noexcept nogil:
    """Send one header; -EAGAIN when nothing of it went, so that the reader of a descriptor never sleeps here."""
    cdef pollfd wait
    cdef size_t done = 0
    cdef ssize_t sent
    while done < sizeof(pagecore_frame):
        sent = send(fd, <const uint8_t *>frame + done, sizeof(pagecore_frame) - done, MSG_DONTWAIT | MSG_NOSIGNAL)
        if sent >= 0:
            done += sent
        elif errno == EAGAIN:
            if done == 0:
                return -EAGAIN
            # Half a frame cannot be taken back.
            wait.fd = fd
            wait.events = POLLOUT
            if poll(&wait, 1, REQUEST_TIMEOUT_MS) == 0:
                return -ETIMEDOUT
        elif errno != EINTR:
            return -errno
    return 0
