from pagecore.dirty_log._memory cimport MemoryDirtyLog
from pagecore.dirty_log._protocol cimport DirtyLog
