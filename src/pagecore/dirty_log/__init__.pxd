from pagecore.dirty_log._protocol cimport DirtyLog
