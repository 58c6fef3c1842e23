"""What a placement loop has counted, and what it failed of, as Python objects."""

import errno
import os

from pagecore.errors import PagecoreError, PeerGoneError, ProtocolError, SourceError, UffdError, UnsupportedError
from pagecore.placement_stats import LatencyHistogram, PlacementStats

from libc.stdint cimport uint64_t

from pagecore._atomic cimport pagecore_load_acquire, pagecore_load_relaxed
from pagecore._placer cimport Placer
from pagecore._shared cimport (
    FAILURE_DUPLICATE,
    FAILURE_FOREIGN,
    FAILURE_FORKED,
    FAILURE_KERNEL,
    FAILURE_LOST,
    FAILURE_NONE,
    FAILURE_OUTSIDE,
    FAILURE_PEER_GONE,
    FAILURE_PROTOCOL,
    FAILURE_REMAPPED,
    FAILURE_SOURCE,
    FAILURE_STREAM,
    FAULT_CLASSES,
    PAGE_CLASSES,
    PAGE_RESULTS,
    PERCENTS,
    PlacementCounters,
    PlacementShared,
)
from pagecore._waiters cimport Latency

_LATENCIES = ("owed", "hinted", "released", "present")
_CLASSES = ("new", "zero", "resident")
_RESULTS = ("installed", "present", "deferred", "discarded", "error")


cdef object error_of(PlacementShared *shared, str name, tuple placers):
    cdef uint64_t kind = pagecore_load_acquire(&shared.failure.kind)
    if kind == FAILURE_NONE:
        return None
    number = shared.failure.error
    page = shared.failure.page
    what = "" if shared.failure.what == NULL else shared.failure.what.decode()
    if kind == FAILURE_KERNEL:
        return UffdError(number, what)
    if kind == FAILURE_PEER_GONE:
        return PeerGoneError("the process whose memory this is has ended")
    if kind == FAILURE_SOURCE:
        return SourceError(f"page {page}: {what or 'receive'}: {os.strerror(number)}", page, 1)
    if kind == FAILURE_STREAM and number == errno.ECONNABORTED:
        return SourceError("a stream of pages was stopped within a frame by an earlier loop: new sockets are needed")
    if kind == FAILURE_STREAM:
        return SourceError(f"a stream of pages: {os.strerror(number)}")
    if kind == FAILURE_PROTOCOL:
        return ProtocolError(what, f"a page frame has a value that cannot be right (page {page})")
    if kind == FAILURE_DUPLICATE:
        return ProtocolError("duplicate", f"page {page} came twice in session {name!r}")
    if kind == FAILURE_FOREIGN:
        return PagecoreError(f"page {page} was present although nobody placed it in session {name!r}")
    if kind == FAILURE_OUTSIDE:
        table = ", ".join([f"{region!r}" for region in [region for placer in placers for region in (<Placer>placer).region.regions]])
        return PagecoreError(f"a fault at {page:#x} is outside every region: {table}")
    if kind == FAILURE_REMAPPED:
        return UnsupportedError("following memory that mremap() moved", "keep guest memory where it is registered")
    if kind == FAILURE_FORKED:
        return UnsupportedError("serving a child of the process whose memory this is",
                                "it gets SIGBUS where a page had not come; fork before the memory is registered, or exec")
    assert kind == FAILURE_LOST
    return PagecoreError(f"page {page} was received and is missing: its memory was lost")


cdef void _snapshot(const uint64_t *words, uint64_t *copy, size_t nbytes) noexcept nogil:
    cdef size_t index
    for index in range(nbytes // sizeof(uint64_t)):
        copy[index] = pagecore_load_relaxed(&words[index])


cdef object stats_of(PlacementShared *shared, tuple states, size_t page_size, object right, object wrong):
    cdef int percent
    cdef PlacementCounters counters
    cdef Latency latency[FAULT_CLASSES]
    cdef uint64_t counted[PAGE_CLASSES][PAGE_RESULTS]
    cdef uint64_t reached_ns[PERCENTS]
    _snapshot(<uint64_t *>&shared.counters, <uint64_t *>&counters, sizeof(counters))
    _snapshot(<uint64_t *>&shared.latency, <uint64_t *>&latency, sizeof(latency))
    _snapshot(<uint64_t *>&shared.outcomes, <uint64_t *>&counted, sizeof(counted))
    _snapshot(<uint64_t *>&shared.reached_ns, <uint64_t *>&reached_ns, sizeof(reached_ns))
    resident = sum([state.received.count() for state in states])
    histograms = {
        name: LatencyHistogram(
            tuple(latency[index].buckets),
            latency[index].total_ns,
            latency[index].max_ns,
        )
        for index, name in enumerate(_LATENCIES)
    }
    outcomes = {
        kind: {result: counted[row][column] for column, result in enumerate(_RESULTS)}
        for row, kind in enumerate(_CLASSES)
    }
    reached = {percent: reached_ns[percent] for percent in range(PERCENTS) if reached_ns[percent]}
    return PlacementStats(**counters, windows_right=right, windows_wrong=wrong, resident=resident, page_size=page_size,
                          outcomes=outcomes, reached_ns=reached, latency=histograms)
