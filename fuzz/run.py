"""Fuzz one parser, or all of them one after another, for a bounded time: ``python fuzz/run.py [TARGET] [--seconds S]``.

Coverage-guided by atheris (``pip install atheris``; Linux x86-64, CPython 3.11 to 3.13). Starts from the inputs in
``fuzz/corpus/TARGET``. What it finds is written to the working directory, and the exit status is not 0; put the input
into the corpus with the fix, where ``tests/test_fuzz_corpus.py`` replays it for ever.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

HERE = pathlib.Path(__file__).resolve().parent
MAX_LENGTH = 1 << 16


def fuzz(name: str, seconds: int, seed: int) -> None:
    """Does not come back: the fuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["pagecore", "json"]):
        from targets import TARGETS
    with tempfile.TemporaryDirectory() as found:
        options = [
            f"-max_total_time={seconds}",
            f"-max_len={MAX_LENGTH}",
            f"-seed={seed}",
            "-timeout=10",
            "-use_value_profile=1",
            "-rss_limit_mb=1024",
        ]
        atheris.Setup([sys.argv[0], *options, found, str(HERE / "corpus" / name)], TARGETS[name])
        atheris.Fuzz()


def main() -> int:
    """Fuzz in a process for each target, since a fuzzer ends its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="?", help="one of those in targets.py; all by default")
    parser.add_argument("--seconds", type=int, default=10, help="for each target (default: 10)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    if options.target is not None:
        fuzz(options.target, options.seconds, options.seed)
    from targets import TARGETS

    def fuzz_one(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, __file__, name, "--seconds", str(options.seconds), "--seed", str(options.seed)]
        return subprocess.run(command, capture_output=True, text=True, timeout=options.seconds + 60, check=False)

    failed = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(fuzz_one, TARGETS))
    for name, done in zip(TARGETS, results, strict=True):
        lines = done.stderr.strip().splitlines()
        print(f"{name}: {'found something' if done.returncode else lines[-1] if lines else 'nothing said'}")
        if done.returncode:
            failed.append(name)
            print(done.stdout + done.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
