"""Many small frames of pages at once, in both directions."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy

from pagecore._page_state cimport PageState
from pagecore._runs cimport Pinned, copied_runs
from pagecore.page_source._frame cimport (
    PAGECORE_FRAME_AGAIN,
    PAGECORE_FRAME_MAGIC,
    PAGECORE_FRAME_PAGES,
    pagecore_frame,
)


cdef enum:
    # As pagecore.wire has it.
    MAX_DATA_BYTES = 1 << 20


cdef size_t _most_pages(size_t page_size) except 0:
    """What a frame may carry: 1 MiB, or one page where pages are larger."""
    if page_size == 0:
        raise ValueError("page size 0")
    return max(<size_t>1, <size_t>MAX_DATA_BYTES // page_size)


def encode_pages(memory, runs, *, size_t page_size=4096, uint8_t flags=0, uint32_t generation=0, uint32_t round=0):
    """Make a frame of each of many runs, its header and a copy of its pages.

    Parameters
    ----------
    memory : buffer
        Region 0: whole pages. Each is read once; nothing keeps others from writing to it meanwhile.
    runs : array_like
        int64, shape (n, 2): first page and page count.
    page_size : int
        Bytes.
    flags, generation, round : int
        Of each frame.

    Returns
    -------
    bytes
        PAGES frames, in the order of the runs.

    Raises
    ------
    IndexError
        A run is outside the memory.
    ValueError
        A run is empty, or longer than a frame; or `runs` has another shape.
    TypeError
        `runs` holds no integers.

    Notes
    -----
    Releases the GIL while it copies. Thread-safe with everything. Needs no kernel interface.
    """
    cdef Pinned pages, given
    cdef pagecore_frame header
    cdef size_t index, count
    cdef size_t most = _most_pages(page_size)
    cdef size_t total = 0
    cdef uint8_t *out
    pages = Pinned(memory, False, page_size)
    given = copied_runs(runs, pages.n)
    for index in range(given.n):
        count = given.numbers()[2 * index + 1]
        if not 0 < count <= most:
            raise ValueError(f"{count} pages of run {index} are not 1 to {most}")
        total += sizeof(header) + count * page_size
    frames = PyBytes_FromStringAndSize(NULL, total)
    out = <uint8_t *>PyBytes_AS_STRING(frames)
    header.magic = PAGECORE_FRAME_MAGIC
    header.type = PAGECORE_FRAME_PAGES
    header.flags = flags
    header.region = 0
    header.generation = generation
    header.round = round
    header.checksum = 0
    with nogil:
        for index in range(given.n):
            header.first = given.numbers()[2 * index]
            header.count = given.numbers()[2 * index + 1]
            header.length = <uint32_t>(header.count * page_size)
            memcpy(out, &header, sizeof(header))
            memcpy(out + sizeof(header), <const uint8_t *>pages.view.buf + header.first * page_size, header.length)
            out += sizeof(header) + header.length
    return frames


def store_pages(frames, memory, PageState state not None, *, size_t page_size=4096, uint32_t generation=0,
                uint32_t round=0):
    """Precopy: store whole frames of pages that a peer sent, up to the first that needs to be looked at more closely.

    Parameters
    ----------
    frames : bytes-like
        Begins with a header.
    memory : buffer
        Writable; region 0, as many pages as `state` has. Not registered.
    state : PageState
        Told of each page that was stored.
    page_size : int
        Bytes.
    generation, round : int
        Of the session, and the one that is due: frames of others are left alone.

    Returns
    -------
    taken, frames, pages : int
        How many bytes of the frames were used, and what was in them. What follows them is no whole frame, no PAGES
        without a checksum, or wrong: `decode_header` tells which, and why.

    Raises
    ------
    ValueError
        The memory and `state` have different sizes.

    Notes
    -----
    Releases the GIL. Thread-safe with everything but others that write to the same buffers. Needs no kernel interface.
    """
    cdef Pinned given, pages
    cdef pagecore_frame header
    cdef const uint8_t *at
    cdef size_t left
    cdef size_t nframes = 0
    cdef size_t npages = 0
    cdef size_t most = _most_pages(page_size)
    given = Pinned(frames, False, 1)
    pages = Pinned(memory, True, page_size)
    if pages.n != state.size:
        raise ValueError(f"the memory has {pages.n} pages, the state {state.size}")
    at = <const uint8_t *>given.view.buf
    left = given.n
    with nogil:
        while left >= sizeof(header):
            memcpy(&header, at, sizeof(header))
            # W4: whatever is unusual is judged where all is.
            if (
                header.magic != PAGECORE_FRAME_MAGIC
                or header.type != PAGECORE_FRAME_PAGES
                or header.flags & ~PAGECORE_FRAME_AGAIN
                or header.checksum
                or header.region
                or header.generation != generation
                or header.round != round
                or header.first >= state.size
                or not 0 < header.count <= state.size - header.first
                or header.count > most
                or header.length != header.count * page_size
                or header.length > left - sizeof(header)
            ):
                break
            memcpy(<uint8_t *>pages.view.buf + header.first * page_size, at + sizeof(header), header.length)
            # D0.
            state.received.c_set_range(header.first, header.count)
            state.zero.c_clear_range(header.first, header.count)
            at += sizeof(header) + header.length
            left -= sizeof(header) + header.length
            nframes += 1
            npages += header.count
    return given.n - left, nframes, npages
