"""How far the bitmaps are from what the machine allows: ``pagecore bench bitmap``.

Always ratios, of paired rounds in one run on the same data: to loops in plain C that do the same work in the way QEMU
does it (``benchmarks/floor.c``, an object file of its own), to the bandwidth of the memory, and to what Python programs
use today.
"""
