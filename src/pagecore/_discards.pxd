from libc.stdint cimport uint64_t

from pagecore._placer cimport Placer
from pagecore._uffd cimport Userfaultfd

# What a REMOVE and an UNMAP of the bytes [start, end) mean for a region, under the exclusive side.
cdef void apply_remove(Placer placer, Userfaultfd uffd, uint64_t start, uint64_t end) noexcept nogil
cdef void apply_unmap(Placer placer, Userfaultfd uffd, uint64_t start, uint64_t end) noexcept nogil
