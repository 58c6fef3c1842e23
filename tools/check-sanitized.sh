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
    # Python does not free everything at its end.
    export ASAN_OPTIONS="$options handle_segv=0 detect_leaks=0"
    tests=(
        tests/test_placement_*.py tests/test_{socket,file,callable,memfd}_source.py tests/test_zero_pages.py
        tests/test_dirty_log*.py tests/test_background_snapshot.py tests/test_saved_bitmap.py
        # It makes processes until a number comes again.
        -k "not number_of_one_that_ended"
    )
    ;;
thread)
    export TSAN_OPTIONS="$options halt_on_error=0 report_signal_unsafe=0"
    export PAGECORE_STRESS_SECONDS="${PAGECORE_STRESS_SECONDS:-2}"
    # ThreadSanitizer wants its shadow where address randomisation may put something else.
    if command -v setarch >/dev/null && setarch -R true 2>/dev/null; then before=(setarch -R); fi
    tests=(
        tests/test_tracker_threads.py tests/test_bitmap_threads.py tests/test_plane_paths.py
        tests/test_placement_ahead.py tests/test_placement_shards.py tests/test_placement_soak.py
        tests/test_socket_source.py tests/test_file_source.py tests/test_dirty_log.py tests/test_dirty_log_kvm_ring.py
        tests/test_dirty_log_kvm_slots.py::test_memory_of_several_slots_is_copied_under_a_running_guest
        tests/test_dirty_log_write_protect.py::test_a_collect_and_the_handler_are_one_step_for_one_another
        tests/test_dirty_log_write_protect.py::test_no_write_is_lost_around_collects
        tests/test_dirty_log_write_protect.py::test_writers_and_discards_meet_a_close
        tests/test_background_snapshot.py::test_the_image_is_the_memory_that_a_forked_child_holds
        tests/test_turns.py::test_a_thread_that_ends_leaves_nothing_of_its_turns_behind
        tests/test_background_snapshot.py::test_discards_are_never_seen_in_the_image
        # What starts a process of its own is about that; the ring and the lazy log are the harder ones.
        -k "not process and not every_path and not get-sync and not clear-sync"
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
CFLAGS="-fsanitize=$sanitizer" LDFLAGS="-fsanitize=$sanitizer" PAGECORE_CFLAGS="-O1 -g1 -fno-omit-frame-pointer" \
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
