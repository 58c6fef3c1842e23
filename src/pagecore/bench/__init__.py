"""What ``pagecore bench`` measures.

``bitmap``: how far the bitmaps are from what the machine allows. Always ratios, of paired rounds in one run on the same
data: to loops in plain C that do the same work in the way QEMU does it (``benchmarks/floor.c``, an object file of its
own), to the bandwidth of the memory, and to what Python programs use today. ``hints``: what free-page hints cost beside
the sync of the bitmaps, and what they save. ``tracker``: hints and takes beside plain C and a loop as QEMU's.
``place``: placement beside the bare ioctls. ``dirty_log``: what logs of writes cost, those who
collect and those who write.
"""
