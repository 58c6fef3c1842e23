#!/usr/bin/env bash
# The stress tests of bitmaps, trackers and the placement loop under ThreadSanitizer, with the stock interpreter: the
# extension modules are built with it in a copy of the tree, and its runtime is loaded before everything else. Any report
# fails; nothing is suppressed.
#   bash tools/check-tsan.sh PYTHON [pytest arguments]
set -euo pipefail
python=$(realpath -s "$1")
shift
compiler=${CC:-cc}
runtime=$($compiler -print-file-name=libtsan.so)
[ "$runtime" != libtsan.so ] || { echo "$compiler has no ThreadSanitizer runtime: install the package libtsan of its version" >&2; exit 1; }
runtime=$(realpath "$runtime")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -R pyproject.toml setup.py README.md src tests benchmarks "$work"
[ ! -e LICENSE ] || cp LICENSE "$work"
cd "$work"
find src -name '*.so' -delete
CFLAGS="-fsanitize=thread" LDFLAGS="-fsanitize=thread" PAGECORE_CFLAGS="-O1 -g" \
    "$python" setup.py -q build_ext --inplace >build.log 2>&1 || { cat build.log; exit 1; }
# ThreadSanitizer wants its shadow where address randomisation may put something else.
fixed=()
if command -v setarch >/dev/null && setarch -R true 2>/dev/null; then fixed=(setarch -R); fi
status=0
# Children of the tests end by SIGBUS on purpose.
TSAN_OPTIONS="log_path=$work/report exitcode=66 halt_on_error=0 report_signal_unsafe=0 handle_sigbus=0" \
    PAGECORE_STRESS_SECONDS="${PAGECORE_STRESS_SECONDS:-2}" PYTHONPATH=src PYTHONMALLOC=malloc LD_PRELOAD="$runtime" \
    "${fixed[@]}" "$python" -m pytest -q -p no:cacheprovider --timeout=600 \
    tests/test_tracker_threads.py tests/test_bitmap_threads.py tests/test_plane_paths.py \
    tests/test_placement_ahead.py tests/test_placement_shards.py tests/test_placement_soak.py \
    -k "not process and not every_path" "$@" || status=$?
if compgen -G "$work/report*" >/dev/null; then
    cat "$work"/report*
    echo "ThreadSanitizer has reported the above"
    exit 1
fi
exit "$status"
