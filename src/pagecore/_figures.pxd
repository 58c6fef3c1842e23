from pagecore._shared cimport PlacementShared


# What the first failure was, as an exception; None where nothing has failed.
cdef object error_of(PlacementShared *shared, str name, tuple placers)
# A relaxed snapshot of everything that is counted.
cdef object stats_of(PlacementShared *shared, tuple states, size_t page_size, object right, object wrong)
