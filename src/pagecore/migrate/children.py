"""The Python processes that a migration starts: both of its sides, and their link helpers."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

__all__ = ["start_python"]


def start_python(module: str, *arguments: str, **options: Any) -> subprocess.Popen[Any]:
    """Start a module as a process of its own.

    In a process group of its own: the terminal's SIGINT reaches the parent alone. Nothing in it multiplies matrices:
    numpy would start a thread for each processor, and they would spin while both sides want to begin.

    Parameters
    ----------
    module : str
    *arguments : str
    **options
        Of `subprocess.Popen`.

    Returns
    -------
    subprocess.Popen
    """
    environment = {"OPENBLAS_NUM_THREADS": "1", **os.environ}
    return subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment, process_group=0, **options)
