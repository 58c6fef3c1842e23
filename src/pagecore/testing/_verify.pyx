"""Verifier: replays a test guest's decisions from its seed, and compares its memory with what must be there.

The replay knows no content and reads nothing of the guest but the number of steps: it draws and decides as
the guest program does (the same inline functions, compiled a second time here) on a table of its own. A guest
whose table, control page or data went stale on the way therefore cannot vouch for itself.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from pagecore._runs cimport Pinned, pinned_runs

import numpy


cdef extern from "_page_hash.h" nogil:
    uint64_t pagecore_page_hash(const uint8_t *page)

cdef extern from "testing/guest_image.h" nogil:
    enum: PAGECORE_GUEST_RING_PAGES
    enum: PAGECORE_GUEST_VCPU_PAGES
    enum: PAGECORE_STEP_NOTHING
    enum: PAGECORE_STEP_FREE
    enum: PAGECORE_STEP_ALLOCATE
    uint64_t PAGECORE_GUEST_PAGE_SIZE
    uint64_t PAGECORE_GUEST_WORDS

    struct pagecore_layout:
        uint64_t pages, vcpus, vcpu_first, table_first, table_pages, data_first, data_pages

    struct pagecore_control:
        uint64_t magic, vcpu, seed, key, table, first, count, ring, batch
        uint64_t free_below, rewrite_below, allocate_below
        uint64_t steps, checks, errors, written, freed, allocated, free_pages

    pagecore_layout pagecore_guest_layout(uint64_t pages, uint64_t vcpus)
    uint64_t pagecore_guest_control_page(const pagecore_layout *layout, uint64_t vcpu)
    void pagecore_guest_configure(pagecore_control *control, const pagecore_layout *layout, uint64_t vcpu,
                                  uint64_t seed, uint64_t share, uint64_t batch)
    uint64_t pagecore_guest_seed_table(uint32_t *entries, uint64_t count, uint64_t key, uint64_t share)
    uint64_t pagecore_guest_draw(uint64_t key, uint64_t step)
    uint64_t pagecore_guest_pick(uint64_t draw, uint64_t count)
    int pagecore_guest_decide(uint64_t draw, uint32_t entry, uint64_t free_below, uint64_t rewrite_below,
                              uint64_t allocate_below)
    uint32_t pagecore_guest_next_entry(uint32_t entry, int action)
    uint64_t pagecore_guest_check_page(const uint64_t *words, uint64_t seed, uint64_t page, uint64_t version)
    int pagecore_guest_fixed_page(const pagecore_layout *layout, uint64_t page, const uint8_t *code,
                                  uint64_t code_size, uint64_t *words)


cdef struct Findings:
    uint64_t right, wrong, free, reserved_right, reserved_wrong, unchecked
    uint64_t errors                 # of the guest's own checks
    size_t listed, reserved_listed

cdef enum:
    LISTED = 64                     # wrong pages named in a report


cdef void _replay(pagecore_control *control, uint32_t *entries, uint64_t share,
                  uint64_t steps) noexcept nogil:
    """Bring this vCPU's share of the table and the counters in `control` to where `steps` steps lead."""
    cdef uint64_t step, draw, at
    cdef uint32_t entry
    cdef int action
    control.free_pages = pagecore_guest_seed_table(entries, control.count, control.key, share)
    for step in range(steps):
        draw = pagecore_guest_draw(control.key, step)
        at = pagecore_guest_pick(draw, control.count)
        entry = entries[at]
        action = pagecore_guest_decide(
            draw, entry, control.free_below, control.rewrite_below, control.allocate_below
        )
        control.checks += entry & 1
        if action == PAGECORE_STEP_NOTHING:
            continue
        entries[at] = pagecore_guest_next_entry(entry, action)
        if action == PAGECORE_STEP_FREE:
            control.freed += 1
            control.free_pages += 1
        else:
            control.written += 1
            if action == PAGECORE_STEP_ALLOCATE:
                control.allocated += 1
                control.free_pages -= 1
    control.steps = steps


cdef bint _same_control(const pagecore_control *found, const pagecore_control *wanted) noexcept nogil:
    """All that the seed decides. `batch`, the ring's indices and the commands are the host's doing."""
    return (
        found.magic == wanted.magic and found.vcpu == wanted.vcpu and found.seed == wanted.seed
        and found.key == wanted.key and found.table == wanted.table and found.first == wanted.first
        and found.count == wanted.count and found.ring == wanted.ring
        and found.free_below == wanted.free_below and found.rewrite_below == wanted.rewrite_below
        and found.allocate_below == wanted.allocate_below and found.steps == wanted.steps
        and found.checks == wanted.checks and found.errors == 0 and found.written == wanted.written
        and found.freed == wanted.freed and found.allocated == wanted.allocated
        and found.free_pages == wanted.free_pages
    )


cdef void _reserved(Findings *findings, bint same, uint64_t page, uint64_t *listed) noexcept nogil:
    if same:
        findings.reserved_right += 1
        return
    findings.reserved_wrong += 1
    if findings.reserved_listed < LISTED:
        listed[findings.reserved_listed] = page
        findings.reserved_listed += 1


cdef int _verify(const uint8_t *memory, uint64_t pages, uint64_t vcpus, uint64_t seed, uint64_t share,
                 const uint8_t *code, uint64_t code_size, const uint64_t *given, uint64_t most,
                 uint64_t *steps, Findings *findings, uint64_t *wrong,
                 uint64_t *reserved_wrong) noexcept nogil:
    cdef pagecore_layout layout = pagecore_guest_layout(pages, vcpus)
    cdef uint32_t *table = <uint32_t *>calloc(layout.table_pages, PAGECORE_GUEST_PAGE_SIZE)
    cdef uint64_t *rendered = <uint64_t *>calloc(1, PAGECORE_GUEST_PAGE_SIZE)
    cdef uint64_t number, page, offset
    cdef uint32_t entry
    cdef pagecore_control found, wanted
    cdef bint same
    if table == NULL or rendered == NULL:
        free(table)
        free(rendered)
        return -1
    for page in range(layout.vcpu_first):
        pagecore_guest_fixed_page(&layout, page, code, code_size, rendered)
        same = memcmp(memory + page * PAGECORE_GUEST_PAGE_SIZE, rendered, PAGECORE_GUEST_PAGE_SIZE) == 0
        _reserved(findings, same, page, reserved_wrong)
    for number in range(vcpus):
        page = pagecore_guest_control_page(&layout, number)
        memcpy(&found, memory + page * PAGECORE_GUEST_PAGE_SIZE, sizeof(found))
        memset(&wanted, 0, sizeof(wanted))
        pagecore_guest_configure(&wanted, &layout, number, seed, share, 0)
        steps[number] = given[number] if given != NULL else found.steps
        # A count of steps beyond belief is a control page that went wrong; nothing is replayed for it.
        _replay(&wanted, table + (wanted.first - layout.data_first), share,
                steps[number] if steps[number] <= most else 0)
        findings.errors += found.errors
        _reserved(findings, _same_control(&found, &wanted), page, reserved_wrong)
    # The rings and the stacks hold what the host's timing made of them.
    findings.unchecked = vcpus * (PAGECORE_GUEST_VCPU_PAGES - 1)
    for page in range(layout.table_pages):
        offset = page * PAGECORE_GUEST_PAGE_SIZE
        same = memcmp(memory + layout.table_first * PAGECORE_GUEST_PAGE_SIZE + offset,
                      <uint8_t *>table + offset, PAGECORE_GUEST_PAGE_SIZE) == 0
        _reserved(findings, same, layout.table_first + page, reserved_wrong)
    for page in range(layout.data_first, pages):
        entry = table[page - layout.data_first]
        if not entry & 1:
            findings.free += 1
        elif pagecore_guest_check_page(<const uint64_t *>(memory + page * PAGECORE_GUEST_PAGE_SIZE), seed,
                                       page, entry >> 1) == PAGECORE_GUEST_WORDS:
            findings.right += 1
        else:
            findings.wrong += 1
            if findings.listed < LISTED:
                wrong[findings.listed] = page
                findings.listed += 1
    free(table)
    free(rendered)
    return 0


def verify(memory, vcpus, seed, share, code, steps=None, max_steps=1 << 36):
    """verify(memory, vcpus, seed, share, code, steps=None, max_steps=68719476736)
    --

    Compare the memory of a stopped test guest with what its seed says. See
    :func:`pagecore.testing.verify_memory`.

    Parameters
    ----------
    memory : buffer
        All of guest memory.
    vcpus, seed, share : int
        As in :class:`pagecore.testing.GuestConfig`.
    code : bytes
        The guest program.
    steps : sequence of int, optional
        Steps of each vCPU; by default what the control pages say.
    max_steps : int
        No vCPU is replayed further.

    Returns
    -------
    dict of str to object
        ``right``, ``wrong``, ``free``, ``reserved_right``, ``reserved_wrong``, ``unchecked``, ``errors``
        (int); ``wrong_pages``, ``reserved_wrong_pages``, ``steps`` (tuples of int).

    Raises
    ------
    ValueError
        If `steps` has another length than `vcpus`.

    Notes
    -----
    Releases the GIL.
    Not thread-safe with a guest that runs.
    Needs no kernel interface.
    """
    cdef Pinned image = Pinned(memory, False, PAGECORE_GUEST_PAGE_SIZE)
    cdef Pinned program = Pinned(code, False)
    cdef Findings findings
    cdef uint64_t given[16]
    cdef uint64_t done[16]
    cdef uint64_t wrong[LISTED]
    cdef uint64_t reserved_wrong[LISTED]
    cdef const uint64_t *steps_given = NULL
    cdef uint64_t c_seed = seed, c_share = share, most = max_steps
    cdef uint32_t c_vcpus, number
    cdef int failed
    if not 1 <= vcpus <= 16:
        raise ValueError(f"{vcpus} vCPUs are outside [1, 16]")
    c_vcpus = vcpus
    if steps is not None:
        if len(steps) != vcpus:
            raise ValueError(f"steps of {len(steps)} vCPUs, need {vcpus}")
        for number in range(c_vcpus):
            given[number] = steps[number]
        steps_given = given
    memset(&findings, 0, sizeof(findings))
    with nogil:
        failed = _verify(
            <const uint8_t *>image.view.buf, image.n, c_vcpus, c_seed, c_share,
            <const uint8_t *>program.view.buf, program.n, steps_given, most, done, &findings, wrong,
            reserved_wrong,
        )
    if failed:
        raise MemoryError()
    return {
        "right": findings.right,
        "wrong": findings.wrong,
        "free": findings.free,
        "reserved_right": findings.reserved_right,
        "reserved_wrong": findings.reserved_wrong,
        "unchecked": findings.unchecked,
        "errors": findings.errors,
        "wrong_pages": tuple([wrong[number] for number in range(findings.listed)]),
        "reserved_wrong_pages": tuple([reserved_wrong[number] for number in range(findings.reserved_listed)]),
        "steps": tuple([done[number] for number in range(c_vcpus)]),
    }


def page_checksums(memory, runs=None):
    """page_checksums(memory, runs=None)
    --

    A 64-bit checksum of each page of 4 KiB.

    Parameters
    ----------
    memory : buffer
        A multiple of 4096 bytes.
    runs : array_like of int, optional
        Runs (first page, page count) of shape (n, 2); all pages by default.

    Returns
    -------
    ndarray of uint64
        One for each page, in the order of `runs`; shape (pages,).

    Raises
    ------
    ValueError
        If the memory is not whole pages, or `runs` has another shape.
    IndexError
        If a run is not inside the memory.

    Notes
    -----
    Releases the GIL: a missing page may be filled meanwhile.
    Thread-safe; a page that is written meanwhile may come out torn.
    Needs no kernel interface.
    """
    cdef Pinned pages = Pinned(memory, False, PAGECORE_GUEST_PAGE_SIZE)
    cdef Pinned wanted, sums
    cdef const int64_t *run
    cdef const uint8_t *base = <const uint8_t *>pages.view.buf
    cdef size_t at, page
    if pages.view.len % PAGECORE_GUEST_PAGE_SIZE:
        raise ValueError(f"memory of {pages.view.len} bytes is not whole pages of {PAGECORE_GUEST_PAGE_SIZE} bytes")
    # A copy: what another thread writes into the caller's array after the check must not count.
    wanted = pinned_runs(numpy.array([[0, pages.n]] if runs is None else runs), pages.n)
    sums = Pinned(numpy.empty(wanted.array[:, 1].sum(), dtype=numpy.uint64), True, sizeof(uint64_t))
    run = wanted.numbers()
    with nogil:
        for at in range(wanted.n):
            for page in range(<size_t>run[2 * at], <size_t>(run[2 * at] + run[2 * at + 1])):
                (<uint64_t *>sums.numbers())[sums.used] = pagecore_page_hash(base + page * PAGECORE_GUEST_PAGE_SIZE)
                sums.used += 1
    return sums.array
