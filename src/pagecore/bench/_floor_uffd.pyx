"""The bare ioctls in C that placing is measured against, and loops over our own C methods."""

from libc.stdint cimport uint8_t, uint64_t, uintptr_t

from pagecore._bitmap cimport Bitmap
from pagecore._place_result cimport clear_tally
from pagecore._region cimport Region
from pagecore._span cimport PlaceTally
from pagecore._uffd_ioctl cimport OPERATION_COPY

cdef extern from * nogil:
    """
    #include <stddef.h>
    #include <stdint.h>
    size_t floor_copy(int, uint64_t, uint64_t, size_t, size_t);
    size_t floor_zero(int, uint64_t, size_t, size_t);
    """
    size_t floor_copy(int fd, uint64_t to, uint64_t source, size_t length, size_t chunk)
    size_t floor_zero(int fd, uint64_t to, size_t length, size_t chunk)


def copy(int fd, uintptr_t to, uintptr_t source, size_t length, size_t chunk):
    cdef size_t done
    with nogil:
        done = floor_copy(fd, to, source, length, chunk)
    return done


def zero(int fd, uintptr_t to, size_t length, size_t chunk):
    cdef size_t done
    with nogil:
        done = floor_zero(fd, to, length, chunk)
    return done


def lose(Region region, Bitmap claimed, Bitmap received, uintptr_t source, size_t calls):
    """c_place_run of one page that another has settled, again and again; how many of them found it present."""
    cdef PlaceTally tally
    cdef size_t call, lost = 0
    with nogil:
        for call in range(calls):
            clear_tally(&tally, 1)
            region.c_place_run(OPERATION_COPY, call % region.size, 1, <const uint8_t *>source, 0, claimed, received, None,
                               &tally)
            lost += tally.present
    return lost
