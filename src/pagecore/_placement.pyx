"""PlacementLoop: serve the faults of registered memory, and place what a source pushes or what is prefetched."""

from pagecore._page_state import PageState
from pagecore._uffd_types import Feature, MemoryKind, RegisterMode
from pagecore._watchdog import StuckWaiter, read_waiting
from pagecore.working_set import WorkingSet

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc

from pagecore._background cimport Background
from pagecore._figures cimport stats_of
from pagecore._move cimport MOST_STAGES, Mover
from pagecore._placer cimport Placer
from pagecore._placing cimport PlacementObserver
from pagecore._reader cimport Reader
from pagecore._recorder cimport Recorder
from pagecore._runs cimport Pinned, copied_runs, new_runs, pinned_runs
from pagecore._shards cimport Shards
from pagecore._sync cimport pagecore_now_ns
from pagecore._uffd cimport Region
from pagecore._waiters cimport FAULT_TABLE
from pagecore._waits cimport PlacementWaits
from pagecore.page_source._protocol cimport PageSource

_PLANES = ("claimed", "received", "released", "hinted", "requested", "excluded")
_REMOVE = int(Feature.EVENT_REMOVE)

# So long does `give_up` wait for a discard to be read, which the kernel makes everything else wait for.
cdef uint64_t GIVE_UP_NS = 2000000000


cdef class PlacementLoop(PlacementWaits):
    """PlacementLoop(regions, source, *, states=None, threads=1, fill=0, duplicates="tolerant", on_lost="poison",
                     on_stop="wake", on_remove=None, around=64, background=False, watchdog=None, observer=None,
                     name="")
    --

    Serve the faults of registered memory, and place what a source pushes or what is prefetched.

    Parameters
    ----------
    regions : sequence of Region
        What is served. Each descriptor has a reader of its own. Regions of several descriptors that have the same id are
        pieces of one, in the order given: with many vCPUs the lock of a single descriptor is what they wait for.
    source : PageSource
        Where content comes from.
    states : sequence of PageState, optional
        The planes of each id; new ones by default. Pages that are already received, released or hinted are honoured.
    threads : int
        Threads that prefetch from a pull source, and as many that serve faults if it is slow. What lies in memory is served
        by the reader itself. A push source has one thread a lane instead.
    fill : int
        32-bit pattern of hinted pages (S6); 0 fills with zeros.
    duplicates : {"tolerant", "strict"}
        Strict: a page that comes twice, or that is present although nobody placed it, is an error (W2).
    on_lost : {"poison", "stall"}
        What becomes of pages that nobody has: SIGBUS for whoever touches them, or an endless wait (D12). Never zeros.
    on_stop : {"wake", "poison"}
        What `stop` does about pages that nobody will place then: their waiters wait for the next loop, or whoever touches
        them gets SIGBUS.
    on_remove : {"release", "keep"}, optional
        What a discard of shared memory means: MADV_REMOVE makes it zeros (release, the default), MADV_DONTNEED leaves its
        content alone (keep), and the kernel reports both alike. Discarded private memory is always released.
    around : int
        Pages of 4 KiB that a pull source may be asked for at a fault, at most. As many as faults in sequence show to be worth it; 1:
        never more than the page.
    background : bool
        Place from a pull source what nobody has asked for, in steps that grow while no fault comes.
    watchdog : float, optional
        Log a warning when somebody has waited so many seconds for a page and nothing was placed meanwhile.
    observer : PlacementObserver, optional
        Told of every placed page.
    name : str
        Names the session in errors and threads.

    Raises
    ------
    ValueError, TypeError
        No region, planes of another size, an unknown policy, a descriptor that reports no discards.
    ClosedError
        A region is not registered any more.

    Notes
    -----
    No thread of the loop takes the GIL between the read of a fault and the wake, so a Python thread may touch the memory
    that is served here: it sleeps with the GIL held, and is woken all the same. Methods may be called from any thread.
    The memory must not be discarded by a thread of this process that holds the GIL while another waits for it.
    In a forked child `stop` closes the child's copies, and whatever would act on the parent's memory or wait for its threads
    is an UnsupportedError.
    Since Linux 4.11 (discards are read as events); poisoning since 6.6.
    """

    def __cinit__(self, regions, PageSource source not None, *, states=None, int threads=1, uint32_t fill=0,
                  str duplicates="tolerant", str on_lost="poison", str on_stop="wake", str on_remove=None, uint64_t around=64,
                  bint background=False, watchdog=None, PlacementObserver observer=None, str name=""):
        cdef Placer placer
        cdef Reader reader
        cdef Region region
        cdef int index
        regions = tuple(regions)
        if not regions:
            raise ValueError("a placement loop needs at least one region")
        for region in regions:
            if region is None:
                raise TypeError("a region is None, not a Region")
            region._check_live()
            if region.modes & RegisterMode.WP and not region.uffd.features & Feature.WP_ASYNC:
                raise ValueError(f"region {region.id} reports write-protect faults, which a placement loop does not serve")
        pieces = {}
        for region in regions:
            others = pieces.setdefault(region.id, [])
            if any([other.uffd is region.uffd for other in others]):
                raise ValueError(f"two regions of one descriptor have the id {region.id}")
            others.append(region)
        shards = [Shards(piece) for piece in pieces.values()]
        if states is None:
            states = [PageState((<Shards>shard).size) for shard in shards]
        states = tuple(states)
        if not all([isinstance(state, PageState) for state in states]):
            raise TypeError("each of the states must be a PageState")
        if len(states) != len(shards):
            raise ValueError(f"{len(states)} states for {len(shards)} regions")
        if threads < 1:
            raise ValueError(f"threads {threads} is less than 1")
        if around < 1:
            raise ValueError(f"around {around} is less than 1")
        if duplicates not in ("tolerant", "strict"):
            raise ValueError(f"duplicates {duplicates!r} is neither 'tolerant' nor 'strict'")
        if on_lost not in ("poison", "stall"):
            raise ValueError(f"on_lost {on_lost!r} is neither 'poison' nor 'stall'")
        if on_stop not in ("poison", "wake"):
            raise ValueError(f"on_stop {on_stop!r} is neither 'poison' nor 'wake'")
        if on_remove not in (None, "release", "keep"):
            raise ValueError(f"on_remove {on_remove!r} is neither 'release' nor 'keep'")
        for region in regions:
            shared = region.kind in (MemoryKind.SHARED, MemoryKind.HUGE_SHARED)
            if on_remove == "keep" and not shared:
                raise ValueError(f"region {region.id} is private memory, which loses its content when it is discarded")
        if background and source.lanes:
            raise ValueError("a source that pushes fills in the background itself")
        if watchdog is not None and not watchdog > 0:
            raise ValueError(f"watchdog {watchdog} is not a number of seconds above 0")
        self.source = source
        self.name = name
        self._placer_threads = threads
        self._fill_is_zero = fill == 0
        self._poison_rest = on_stop == "poison"
        self._patience = watchdog
        self._shared.strict = duplicates == "strict"
        self._shared.poison_lost = on_lost == "poison"
        self._background = Background(background)
        self._recorder = Recorder()
        for region in regions:
            if not region.uffd.features & _REMOVE:
                raise ValueError("the descriptor was opened without EVENT_REMOVE: a discard by the guest would go unseen, "
                                 "and old data would be placed over its zeros (D3)")
        source.accept(regions)
        if len(shards) < len(regions):
            PageSource.accept(source, shards)       # it has the pages of all pieces
        placers = []
        for shard, state in zip(shards, states):
            if any([(<Placer>other).state is state for other in placers]):
                raise ValueError("two regions have the same planes: each page has a bit of its own")
            placer = Placer(shard, state, source, observer, fill, on_remove == "keep")
            placer.c_join(&self._shared, len(placers))
            placers.append(placer)
        self._placer_objects = tuple(placers)
        readers = []
        for region in regions:
            if not any([(<Reader>other).uffd is region.uffd for other in readers]):
                reader = Reader(region.uffd, placers, around, self._recorder)
                reader.c_join(&self._shared)
                readers.append(reader)
        self._reader_objects = tuple(readers)
        self._gather_blocks(shards, observer)
        self._placers = <void **>calloc(len(placers), sizeof(void *))
        self._readers = <void **>calloc(len(readers), sizeof(void *))
        if self._placers == NULL or self._readers == NULL:
            raise MemoryError()
        self._count = len(placers)
        for index in range(self._count):
            self._placers[index] = <void *>placers[index]
        self._reader_count = len(readers)
        for index in range(self._reader_count):
            self._readers[index] = <void *>readers[index]

    def _gather_blocks(self, shards, PlacementObserver observer):
        """Have whole blocks come in huge pages, to be moved, where that works and whoever looks on can follow it."""
        cdef Region region
        movable = []
        if (observer is None or observer.c_follows_moves) and 0 < self.source.bulk_lanes <= MOST_STAGES:
            for shard in shards:
                region = (<Shards>shard).regions[0]
                if len((<Shards>shard).regions) == 1 and region.c_movable:
                    movable.append(region)
        self._movable = movable
        if movable:
            self._mover = Mover(self.source.bulk_lanes)

    # Requests ------------------------------------------------------------------------------------------------------

    @property
    def uffd(self):
        """Userfaultfd: the descriptor of the first region."""
        return (<Reader>self._reader_objects[0]).uffd

    def _placer(self, int region_id):
        cdef Placer placer
        for placer in self._placer_objects:
            if placer.region.id == region_id:
                return placer
        raise ValueError(f"no region has the id {region_id}")

    def prefetch(self, runs, *, int region_id=0):
        """Have runs placed in the background; from a push source, ask for them.

        Parameters
        ----------
        runs : array_like
            int64, shape (n, 2): first page and page count.
        region_id : int
            The region.

        Raises
        ------
        ClosedError
            The loop has been stopped.

        Notes
        -----
        Releases the GIL while it asks. Thread-safe. Pages that are claimed already are skipped when their turn comes.
        """
        cdef Placer placer = self._placer(region_id)
        cdef Pinned pinned = copied_runs(runs, placer.region.size)
        cdef bint queued = True
        self._check_not_stopped()
        with nogil:
            if self.source.lanes:
                self.c_request(<void *>placer, pinned.numbers(), pinned.n, False)
            else:
                queued = self.c_enqueue(<void *>placer, pinned.numbers(), pinned.n)
        if not queued:
            raise MemoryError(f"no memory to queue {pinned.n} runs")

    def request_again(self, runs, *, int region_id=0):
        """Ask the source for pages whatever it believes to have sent (``again``, S7).

        Parameters
        ----------
        runs : array_like
            int64, shape (n, 2). Pages that are settled meanwhile count as duplicates when they come, also
            in a strict session, which does not fail of them.
        region_id : int
            The region.

        Raises
        ------
        ValueError
            The source is pulled: there is nobody to ask.
        ClosedError
            The loop has been stopped.

        Notes
        -----
        Releases the GIL. Thread-safe.
        """
        cdef Placer placer = self._placer(region_id)
        cdef Pinned pinned = copied_runs(runs, placer.region.size)
        if not self.source.lanes:
            raise ValueError("a pull source is not asked again: prefetch the runs")
        self._check_not_stopped()
        with nogil:
            self.c_request(<void *>placer, pinned.numbers(), pinned.n, True)

    def forget(self, runs, *, int region_id=0):
        """The owner of shared memory is about to punch a hole, which sends no event: call this before (D3).

        Parameters
        ----------
        runs : array_like
            int64, shape (n, 2). From now on these pages read as zeros whenever they are missing.
        region_id : int
            The region.

        Notes
        -----
        Releases the GIL. Returns when the pages are marked: no copy that arrives later is placed.
        """
        cdef Placer placer = self._placer(region_id)
        cdef Pinned pinned = copied_runs(runs, placer.region.size)
        cdef size_t run
        self._check_process()
        with nogil:
            for run in range(pinned.n):
                placer.c_forget(pinned.numbers()[2 * run], pinned.numbers()[2 * run + 1])

    def give_up(self, runs, *, int region_id=0):
        """Nobody will send these pages any more: by policy they fail closed (SIGBUS) or stall (D12).

        Parameters
        ----------
        runs : array_like
            int64, shape (n, 2). Pages that are settled or under way are left alone.
        region_id : int
            The region.

        Notes
        -----
        Releases the GIL. While a discard is pending the kernel poisons nothing: where no thread reads it within 2 s, `error`
        says so. Poisoning needs Linux 6.6. Before, `error` says so, and these pages are waited for as long as some
        descriptor of the userfaultfd is open: hold a duplicate until the process whose memory it is has ended.
        """
        cdef Placer placer = self._placer(region_id)
        cdef Pinned pinned = copied_runs(runs, placer.region.size)
        cdef uint64_t until = pagecore_now_ns() + GIVE_UP_NS
        cdef size_t run
        self._check_process()
        with nogil:
            for run in range(pinned.n):
                placer.c_give_up(pinned.numbers()[2 * run], pinned.numbers()[2 * run + 1], until)

    @property
    def background_step(self):
        """int: pages of 4 KiB that the background fill places between two pauses; 16 right after a fault."""
        return self._background.step

    # Working sets --------------------------------------------------------------------------------------------------------

    def record_working_set(self):
        """Record which pages are touched, in the order of their first touch, from now on. No guesses are placed meanwhile.

        Raises
        ------
        BusyError
            It is being recorded already.
        ValueError
            The background fill is on: what it has placed is touched without anybody noticing.

        Notes
        -----
        Takes 16 bytes and a bit for each page of all regions, once.
        """
        if self._background.c_enabled:
            raise ValueError("a working set is recorded without the background fill, which would hide touches")
        self._recorder.begin([state.size for state in self.states])

    def working_set(self):
        """Return what was recorded.

        Returns
        -------
        WorkingSet
            Runs in the order of their first touch.

        Raises
        ------
        ValueError
            Nothing is being recorded.
        """
        if not self._recorder.active:
            raise ValueError("no working set is recorded: call record_working_set() first")
        ids = [(<Placer>placer).region.id for placer in self._placer_objects]
        return WorkingSet.from_touches(self._recorder.touches(), ids, self.source.page_size)

    def replay(self, working_set):
        """Prefetch a recorded working set, in its order.

        Parameters
        ----------
        working_set : WorkingSet
            What `working_set` or `WorkingSet.load` returned.

        Raises
        ------
        ValueError, IndexError
            Pages of another size; a region that this loop does not have; a run outside its region. Nothing is prefetched
            then.
        ClosedError
            The loop has been stopped.
        """
        if working_set.page_size != self.source.page_size:
            raise ValueError(f"the working set has pages of {working_set.page_size} bytes, the source of "
                             f"{self.source.page_size}")
        parts = [(region_id, runs) for region_id, runs in working_set.parts()]
        for region_id, runs in parts:
            pinned_runs(runs, (<Placer>self._placer(region_id)).region.size)
        # The queue is taken from its end: what comes first is put last.
        for region_id, runs in reversed(parts) if not self.source.lanes else parts:
            self.prefetch(runs, region_id=region_id)

    # Progress ------------------------------------------------------------------------------------------------------

    def unsettled(self, *, int region_id=0, bint fill_is_zero=True):
        """Return the runs that an unregister would turn into wrong zeros (D16).

        Parameters
        ----------
        region_id : int
            The region.
        fill_is_zero : bool
            Hinted pages with a fill of zeros may stay missing.

        Returns
        -------
        numpy.ndarray
            int64, shape (n, 2).
        """
        cdef Placer placer = self._placer(region_id)
        return placer.state.unsettled(fill_is_zero=fill_is_zero)

    def stuck(self, double seconds=0.0):
        """Who has waited for a page so long.

        Parameters
        ----------
        seconds : float
            At least.

        Returns
        -------
        list of StuckWaiter
            The longest wait first. At most 256 of each region are known.
        """
        cdef Placer placer
        cdef Pinned pairs
        found = []
        for placer in self._placer_objects:
            pairs = new_runs(FAULT_TABLE)
            with nogil:
                pairs.used = placer._waiters.c_list(<uint64_t *>pairs.numbers())
            for page, age in pairs.filled().tolist():
                if age >= seconds * 1e9:
                    state = placer.state
                    found.append(StuckWaiter(placer.region.id, page, age / 1e9, tuple(
                        [name for name in _PLANES if getattr(state, name).test(page)])))
        return sorted(found, key=lambda waiter: -waiter.seconds)

    def waiter_figures(self):
        """What the kernel says about each descriptor.

        Returns
        -------
        list of Waiting
            Faults that nobody has read, and all that sleep.
        """
        return [read_waiting((<Reader>reader).c_poll_fd) for reader in self._reader_objects]

    def stats(self):
        """Return the counters.

        Returns
        -------
        PlacementStats
            A relaxed snapshot.
        """
        right = wrong = 0
        for reader in self._reader_objects:
            for window in reader.windows:
                right += window.right
                wrong += window.wrong
        return stats_of(&self._shared, self.states, self.source.page_size, right, wrong)
