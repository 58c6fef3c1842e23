"""Build the Cython modules; everything else about the package stands in pyproject.toml."""

import os
import pathlib
import platform

from Cython.Build import cythonize
from setuptools import Extension, setup

SOURCES = pathlib.Path("src")
HEADERS = [str(path) for path in SOURCES.rglob("*.h")]
DEBUG = os.environ.get("PAGECORE_DEBUG") == "1"
# extra_compile_args stand after $CFLAGS and would win over them: the optimisation level is ours only by default.
OPTIMISE = os.environ.get("PAGECORE_CFLAGS", "-O1 -g -DPAGECORE_DEBUG" if DEBUG else "-O3 -g1").split()
FLAGS = ["-std=gnu11", "-fvisibility=hidden", "-Wall", "-Wextra", *OPTIMISE]

DIRECTIVES = {
    "language_level": 3,
    "freethreading_compatible": True,
    "auto_pickle": False,
    "boundscheck": DEBUG,
    "initializedcheck": DEBUG,
    "wraparound": False,
    "cdivision": True,
}

# The guest program is copied into guest memory and runs there: no helper calls, no tables, no second text section.
FREESTANDING = [
    "-fno-stack-protector",
    "-fno-jump-tables",
    "-fno-tree-loop-distribute-patterns",
    "-fno-reorder-blocks-and-partition",
    "-fcf-protection=none",
    "-fno-sanitize=all",
]
POPCOUNT = ["-mpopcnt"] if platform.machine() in ("x86_64", "AMD64") else []
SPECIAL = {
    "pagecore.testing._machine_state": {
        "sources": [f"src/pagecore/testing/{name}.c" for name in ("guest_program", "machine", "kvm_machine")],
        "extra_compile_args": FLAGS + FREESTANDING,
    },
    # What the bitmaps are measured against: as a tuned build of a peer would be compiled.
    "pagecore.bench._floor_uffd": {"sources": ["benchmarks/floor_uffd.c"]},
    "pagecore.bench._floor_dirty": {
        "sources": ["benchmarks/floor_dirty.c", "benchmarks/writer_vm.c"],
        "include_dirs": ["benchmarks"],
    },
    "pagecore.bench._floor": {
        "sources": ["benchmarks/floor.c", "benchmarks/floor_hints.c"],
        "extra_compile_args": ["-std=gnu11", "-O2", "-Wall", "-Wextra", *POPCOUNT],
    },
}


def extension(path: pathlib.Path) -> Extension:
    name = ".".join(path.relative_to(SOURCES).with_suffix("").parts)
    special = SPECIAL.get(name, {})
    return Extension(
        name,
        [str(path), *special.get("sources", [])],
        include_dirs=["src/pagecore", *special.get("include_dirs", [])],
        depends=HEADERS,
        extra_compile_args=special.get("extra_compile_args", FLAGS),
        extra_link_args=["-pthread"],
    )


# What translates beside us may start from this file: it shall not build anything then.
if __name__ == "__main__":
    setup(
        ext_modules=cythonize(
            [extension(path) for path in sorted(SOURCES.rglob("*.pyx"))],
            build_dir="build/cython",
            compiler_directives=DIRECTIVES,
            include_path=["src"],
            nthreads=os.cpu_count() or 1,
        ),
        options={"build_ext": {"parallel": os.cpu_count()}},
    )
