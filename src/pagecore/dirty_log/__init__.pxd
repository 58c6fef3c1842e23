from pagecore.dirty_log._kvm_ring cimport KvmDirtyRing
from pagecore.dirty_log._memory cimport MemoryDirtyLog
from pagecore.dirty_log._protocol cimport DirtyLog
