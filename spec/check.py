#!/usr/bin/env python3
"""Search every model of spec/ exhaustively, then every mutant; fail unless all models pass and all mutants are caught.

Needs spin (tools/ensure-spin.sh) and gcc; of Python only the standard library.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from table import MODELS, MUTANTS, Model, Mutant

HERE = Path(__file__).resolve().parent
# Of one search. Two run beside one another, and together stay below 4 GB.
MEMORY_MB = 1900
TIMEOUT = 150
DEPTH = 1_000_000
# What the verifier says when it has not seen everything.
INCOMPLETE = ("max search depth too small", "Search not completed", "out of memory", "reached -DMEMLIM", "error:")


@dataclass
class Search:
    """What one run of the verifier came to."""

    states: int
    seconds: float
    errors: int
    message: str
    trace: list[str]


class CheckError(Exception):
    """A tool failed, or a search did not see everything."""


def _run(command: list[str], directory: str, timeout: float = TIMEOUT) -> str:
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise CheckError(f"{command[0]} took more than {timeout:g} s") from None
    if done.returncode and command[0] != "./pan":
        raise CheckError(f"{' '.join(command)}: {(done.stdout + done.stderr).strip()[-2000:]}")
    return done.stdout + done.stderr


def search(file: str, defines: list[str], *, shortest: bool) -> Search:
    """Generate, compile and run one verifier.

    Parameters
    ----------
    file : str
        The model, without its suffix.
    defines : list of str
        For its preprocessor.
    shortest : bool
        Breadth first: the first error found has the shortest trace.
    """
    model = str(HERE / f"{file}.pml")
    flags = [f"-D{one}" for one in defines]
    with tempfile.TemporaryDirectory(prefix="pagecore-spec-") as directory:
        _run(["spin", *flags, "-a", model], directory)
        mode = ["-DBFS"] if shortest else []
        _run(["gcc", "-O2", "-w", "-DSAFETY", f"-DMEMLIM={MEMORY_MB}", *mode, "-o", "pan", "pan.c"], directory)
        began = time.monotonic()
        output = _run(["./pan", f"-m{DEPTH}"], directory)
        seconds = time.monotonic() - began
        states = re.search(r"^\s*(\d+) states, stored", output, re.MULTILINE)
        errors = re.search(r"errors: (\d+)", output)
        found = re.search(r"^pan:\d+: (.*) \(at depth \d+\)", output, re.MULTILINE)
        message = found.group(1) if found else ""
        if states is None or errors is None or (not message and any(words in output for words in INCOMPLETE)):
            raise CheckError(f"the search of {file} {' '.join(flags)} is not complete:\n{output[-2000:]}")
        trace = []
        if message:
            trail = next(path.name for path in Path(directory).glob("*.trail"))
            replay = _run(["spin", *flags, "-t", "-k", trail, model], directory)
            trace = _steps(replay)
        return Search(int(states.group(1)), seconds, int(errors.group(1)), message, trace)


def _steps(replay: str) -> list[str]:
    """What the processes print, in their columns, up to the state in which it ends."""
    lines = []
    for line in replay.splitlines():
        if line.startswith("#processes"):
            break
        if line.strip() and not line.startswith("spin:"):
            lines.append(line.rstrip())
    return lines


def check_model(model: Model) -> tuple[bool, str, list[str]]:
    """Search a model; (good, line, trace)."""
    name = f"{model.file + ' (' + model.name + ')':60}"
    try:
        result = search(model.file, list(model.defines), shortest=False)
    except CheckError as error:
        return False, f"MODEL   {name} FAILED: {error}", []
    good = result.errors == 0
    outcome = "passes" if good else f"FAILED: {result.message}"
    return good, f"model   {name} {outcome}, {_figures(result)}", result.trace


def check_mutant(mutant: Mutant) -> tuple[bool, str, list[str]]:
    """Search a mutant; (caught, line, trace)."""
    number = f"row {mutant.row}: " if mutant.row else ""
    name = f"{mutant.file + '/' + mutant.macro + ' (' + number + mutant.taken_out + ')':60}"
    try:
        result = search(mutant.file, [f"MUTANT_{mutant.macro}", *mutant.defines], shortest=True)
    except CheckError as error:
        return False, f"mutant  {name} FAILED: {error}", []
    # The verifier writes its expressions with other spaces than the model.
    said = result.message.replace(" ", "") + " "
    if not result.errors:
        outcome = "NOT CAUGHT"
    elif mutant.found.replace(" ", "") not in said:
        outcome = f"NOT CAUGHT: found {result.message!r} instead of {mutant.found!r}"
    else:
        outcome = f"caught: {mutant.happens}"
    return outcome.startswith("caught"), f"mutant  {name} {outcome}, {_figures(result)}", result.trace


def _figures(result: Search) -> str:
    return f"{result.states} states, {result.seconds:.1f} s"


def main() -> int:
    """Run what was asked for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these: files (source), mutants (EPOCHS) or row numbers")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="searches beside one another")
    parser.add_argument("--trace", action="store_true", help="print the shortest trace of each mutant")
    options = parser.parse_args()
    wanted = set(options.names)
    models = [one for one in MODELS if not wanted or one.file in wanted]
    mutants = [one for one in MUTANTS if not wanted or wanted & {one.file, one.macro, str(one.row)}]
    if not models and not mutants:
        parser.error(f"nothing has the name {' or '.join(options.names)}")
    began = time.monotonic()
    bad = 0
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        work = [pool.submit(check_model, model) for model in models]
        work += [pool.submit(check_mutant, mutant) for mutant in mutants]
        for one in work:
            good, line, trace = one.result()
            bad += not good
            print(line, flush=True)
            if options.trace or (not good and trace):
                print("\n".join(f"    {step}" for step in trace), flush=True)
    seconds = time.monotonic() - began
    verdict = f"{bad} FAILED" if bad else "every model passes, every mutant is caught"
    print(f"{len(models)} models, {len(mutants)} mutants: {verdict}, {seconds:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
