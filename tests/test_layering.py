"""The layers of the package, read from its imports: each module imports only from lines above its own."""

import pathlib
import re

import pagecore

PACKAGE = pathlib.Path(pagecore.__file__).parent

# From the bottom up; modules of one line may import one another's names only where they are one module in parts.
LAYERS = [
    ["errors", "convergence"],
    ["files"],
    ["_atomic", "_bitscan", "_map", "_kernel_abi", "_sync", "_uffd_types"],
    ["_mappings"],
    ["_runs"],
    ["_words"],
    ["_listing"],
    ["_bitmap"],
    ["_discard_pages", "_run_count", "_zero_pages", "saved_bitmap"],
    ["_turns"],
    ["_uffd_ioctl"],
    ["_descriptor"],
    ["_span"],
    ["_place_result"],
    ["_region"],
    ["_uffd"],
    ["_move", "_write_traps"],
    ["_snapshot_traps"],
    ["background_snapshot"],
    ["probe"],
    ["_page_state"],
    ["page_source"],
    ["placement_stats"],
    ["_waiters", "_window", "_shards", "_holes", "_watchdog", "working_set"],
    ["_shared", "_recorder"],
    ["_parking"],
    ["_placing"],
    ["_placer"],
    ["_figures", "_background", "_discards"],
    ["_reader"],
    ["_engine"],
    ["_threads"],
    ["_waits"],
    ["_placement"],
    ["dirty_log"],
    ["_sampling"],
    ["dirty_rate"],
    ["tracked_region", "settled"],
    ["_source_planes"],
    ["_tracker_core"],
    ["_tracker_sends"],
    ["_tracker"],
    ["hints"],
    ["_wire_frames", "_wire_hello", "_wire_sets"],
    ["wire"],
    ["testing"],
    ["migrate"],
    ["aio", "metrics"],
    ["bench"],
    ["firecracker"],
    ["snapshot_server"],
    ["conformance"],
    ["_progress_view"],
    ["_bench_view", "_cli_view"],
    ["_inspect_view"],
    ["cli"],
    ["__main__"],
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
IMPORT = re.compile(r"^\s*(?:from\s+(pagecore[\w.]*)\s+c?import\s+(.+)|c?import\s+(pagecore[\w.]*))", re.MULTILINE)
PUBLIC_ONLY = {"migrate", "aio", "metrics", "firecracker", "snapshot_server", "conformance", "cli", "__main__"}


def sources():
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".pyx", ".pxd"):
            yield path


def module_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path):
    """(the module under pagecore or "" for the package itself, its full dotted name) of each import."""
    for found in IMPORT.finditer(path.read_text()):
        dotted = found.group(1) or found.group(3)
        parts = dotted.split(".")[1:]
        yield (parts[0] if parts else ""), dotted


def test_every_module_has_a_layer():
    unknown = {module_of(path) for path in sources()} - set(RANK) - {"__init__"}
    assert not unknown, f"say in LAYERS where these stand: {sorted(unknown)}"


def test_no_import_points_upward():
    upward = []
    for path in sources():
        module = module_of(path)
        if module == "__init__":
            continue
        for target, dotted in imports(path):
            if target in ("", module):
                continue
            if RANK[target] >= RANK[module]:
                upward.append(f"{path.relative_to(PACKAGE)} imports {dotted}")
    assert not upward


def test_the_package_itself_is_imported_from_above_only():
    """`from pagecore import X` in a lower module would import everything above it first."""
    low = [
        str(path.relative_to(PACKAGE))
        for path in sources()
        if module_of(path) not in PUBLIC_ONLY | {"__init__"}
        for target, _ in imports(path)
        if target == ""
    ]
    assert not low


def test_controllers_use_public_names_alone():
    private = []
    for path in sources():
        if module_of(path) in PUBLIC_ONLY:
            private += [
                f"{path.relative_to(PACKAGE)} imports {dotted}"
                for _, dotted in imports(path)
                if any(part.startswith("_") for part in dotted.split(".")[1:] if part != "__main__")
            ]
    assert not private


def test_bitmaps_and_descriptors_know_nothing_of_one_another():
    for path in sources():
        if module_of(path) in ("_bitmap", "_words", "_runs", "_bitscan"):
            assert not {target for target, _ in imports(path)} & {
                "_uffd",
                "_descriptor",
                "_span",
                "_region",
                "_uffd_types",
            }, path


def test_atomics_are_spelled_in_one_place():
    for path in [*sources(), *PACKAGE.rglob("*.h"), *PACKAGE.rglob("*.c")]:
        if path.name != "_atomic.h":
            assert "__atomic_" not in path.read_text(), path


def test_userfaultfd_ioctls_are_issued_in_one_module():
    """Where faults can be injected: nobody else knows the numbers of the requests."""
    issuing = re.compile(r"\bioctl\(.*UFFDIO|\bpagecore_ioctl\(|= *UFFDIO_|\w \"(PAGECORE_)?UFFDIO_")
    found = {module_of(path) for path in sources() if issuing.search(path.read_text())}
    assert found == {"_uffd_ioctl"}


def test_no_file_is_too_long():
    long = {
        str(path.relative_to(PACKAGE)): lines
        for path in [*sources(), *PACKAGE.rglob("*.h"), *PACKAGE.rglob("*.c")]
        if (lines := len(path.read_text().splitlines())) > 650
    }
    assert not long, "a file of over about 600 lines is two files"
