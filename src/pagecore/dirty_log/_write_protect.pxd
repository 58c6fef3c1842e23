from pagecore.dirty_log._protocol cimport DirtyLog


cdef class WriteProtectDirtyLog(DirtyLog):
    """Writes as they trap: userfaultfd in synchronous write-protect mode."""

    cdef object _traps      # LogTraps, which the handler's thread holds too; None before it is open
