#!/usr/bin/env bash
# Tests under AddressSanitizer or ThreadSanitizer, with the stock interpreter: the extension modules are built with it in a
# copy of the tree, and its runtime is loaded before everything else. Any report fails; nothing is suppressed.
#   bash tools/check-sanitized.sh address|thread PYTHON [pytest arguments]
set -euo pipefail
sanitizer=$1
python=$(realpath -s "$2")
shift 2
compiler=${CC:-cc}
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Children of the tests end by SIGBUS on purpose.
options="log_path=$work/report exitcode=66 handle_sigbus=0"
before=()
case $sanitizer in
address)
    flags="-O1 -g1 -fno-omit-frame-pointer"
    # Python does not free everything at its end.
    export ASAN_OPTIONS="$options handle_segv=0 detect_leaks=0"
    tests=(tests/test_placement_*.py tests/test_socket_source.py)
    ;;
thread)
    flags="-O1 -g"
    export TSAN_OPTIONS="$options halt_on_error=0 report_signal_unsafe=0"
    export PAGECORE_STRESS_SECONDS="${PAGECORE_STRESS_SECONDS:-2}"
    # ThreadSanitizer wants its shadow where address randomisation may put something else.
    if command -v setarch >/dev/null && setarch -R true 2>/dev/null; then before=(setarch -R); fi
    tests=(
        tests/test_tracker_threads.py tests/test_bitmap_threads.py tests/test_plane_paths.py
        tests/test_placement_ahead.py tests/test_placement_shards.py tests/test_placement_soak.py
        -k "not process and not every_path"
    )
    ;;
*)
    echo "$sanitizer is neither address nor thread" >&2
    exit 2
    ;;
esac
name=lib${sanitizer:0:1}san
runtime=$($compiler -print-file-name="$name.so")
[ "$runtime" != "$name.so" ] || { echo "$compiler has no runtime for -fsanitize=$sanitizer: install the package $name of its version" >&2; exit 1; }
cp -pR pyproject.toml setup.py README.md src tests benchmarks "$work"
[ ! -e LICENSE ] || cp LICENSE "$work"
# What was translated to C already: it is the same for every compiler.
[ ! -e build/cython ] || { mkdir "$work/build" && cp -pR build/cython "$work/build"; }
cd "$work"
find src -name '*.so' -delete
CFLAGS="-fsanitize=$sanitizer" LDFLAGS="-fsanitize=$sanitizer" PAGECORE_CFLAGS="$flags" \
    "$python" setup.py -q build_ext --inplace >build.log 2>&1 || { cat build.log; exit 1; }
status=0
PYTHONPATH=src PYTHONMALLOC=malloc LD_PRELOAD=$(realpath "$runtime") \
    "${before[@]}" "$python" -m pytest -q -p no:cacheprovider --timeout=600 "${tests[@]}" "$@" || status=$?
if compgen -G "$work/report*" >/dev/null; then
    cat "$work"/report*
    echo "the sanitizer has reported the above"
    exit 1
fi
exit "$status"
