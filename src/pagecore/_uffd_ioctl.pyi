from typing import Literal

__all__ = ["query_access"]

def query_access(access: Literal["device", "syscall", "user-mode"]) -> tuple[int, int]: ...
