from pagecore._bitmap cimport Bitmap
from pagecore.dirty_log._protocol cimport DirtyLog


cdef class MemoryDirtyLog(DirtyLog):
    cdef readonly Bitmap bitmap     # writers set a page's bit after they wrote the page
