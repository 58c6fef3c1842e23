# _map.h and _keeper.h. Not for consumers: they have no include path to the headers.
from libc.stdint cimport int64_t, uint64_t

cdef extern from "_map.h" nogil:
    ctypedef struct pagecore_keeper "struct pagecore_keeper":
        uint64_t *summary
        uint64_t stale
    ctypedef struct pagecore_map "struct pagecore_map":
        uint64_t *words
        size_t size
        pagecore_keeper *keeper
    size_t pagecore_summary_words(size_t size)
    void pagecore_note_set(pagecore_keeper *keeper, size_t first, size_t end)
    void pagecore_mark(pagecore_keeper *keeper, size_t first, size_t end)
    void pagecore_note_cleared(pagecore_keeper *keeper)
    void pagecore_begin_call(pagecore_keeper *keeper)
    void pagecore_end_call(pagecore_keeper *keeper, size_t more, size_t fewer)
    size_t pagecore_map_count(pagecore_map map)
    size_t pagecore_map_count_runs(pagecore_map map, size_t start)
    size_t pagecore_map_find_set(pagecore_map map, size_t first, size_t end)
    size_t pagecore_map_indices(pagecore_map map, size_t start, int64_t *indices, size_t capacity, size_t *next)
    size_t pagecore_map_runs(pagecore_map map, size_t start, int64_t *pairs, size_t capacity, size_t *next)
    size_t pagecore_map_set_range(pagecore_map map, size_t first, size_t end)
    size_t pagecore_map_clear_range(pagecore_map map, size_t first, size_t end)
    size_t pagecore_map_apply_runs(pagecore_map map, const int64_t *pairs, size_t n, bint set, size_t *done)
    size_t pagecore_map_apply_indices(pagecore_map map, const int64_t *indices, size_t n, bint set, size_t *done)
    size_t pagecore_map_take_runs(pagecore_map map, size_t start, size_t stop, size_t max_pages, int64_t *pairs,
                                  size_t capacity, size_t *next)
    size_t pagecore_map_drain(pagecore_map source, pagecore_map dest, bint from_owned, bint to_owned)
    size_t pagecore_map_merge(pagecore_map source, pagecore_map dest)
