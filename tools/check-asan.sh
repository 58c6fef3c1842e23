#!/usr/bin/env bash
# The placement loop under AddressSanitizer, with the stock interpreter: the extension modules are built with it in a copy
# of the tree, and its runtime is loaded before everything else. Any report fails.
#   bash tools/check-asan.sh PYTHON [pytest arguments]
set -euo pipefail
python=$(realpath -s "$1")
shift
compiler=${CC:-cc}
runtime=$($compiler -print-file-name=libasan.so)
[ "$runtime" != libasan.so ] || { echo "$compiler has no AddressSanitizer runtime: install the package libasan of its version" >&2; exit 1; }
runtime=$(realpath "$runtime")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -R pyproject.toml setup.py README.md src tests benchmarks "$work"
[ ! -e LICENSE ] || cp LICENSE "$work"
cd "$work"
find src -name '*.so' -delete
CFLAGS="-fsanitize=address" LDFLAGS="-fsanitize=address" PAGECORE_CFLAGS="-O1 -g1 -fno-omit-frame-pointer" \
    "$python" setup.py -q build_ext --inplace >build.log 2>&1 || { cat build.log; exit 1; }
status=0
# The tests end children by SIGBUS on purpose, and Python does not free everything at its end.
ASAN_OPTIONS="log_path=$work/report exitcode=66 detect_leaks=0 handle_sigbus=0 handle_segv=0" \
    PYTHONPATH=src PYTHONMALLOC=malloc LD_PRELOAD="$runtime" \
    "$python" -m pytest -q -p no:cacheprovider --timeout=600 \
    tests/test_placement_*.py tests/test_socket_source.py "$@" || status=$?
if compgen -G "$work/report*" >/dev/null; then
    cat "$work"/report*
    echo "AddressSanitizer has reported the above"
    exit 1
fi
exit "$status"
