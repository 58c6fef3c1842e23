#!/usr/bin/env bash
# sdist -> wheel -> import in a clean environment, away from the source tree.
set -euo pipefail
python=$(realpath -s "$1")
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m build -q --no-isolation --sdist --outdir "$work/sdist" "$root"
cd "$work"
# That it compiles from the sdist alone is looked at, and not how fast that is.
PAGECORE_CFLAGS=-O1 "$python" -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w wheel sdist/*.tar.gz
"$python" - wheel/*.whl <<'PY'
import sys, zipfile
names = zipfile.ZipFile(sys.argv[1]).namelist()
for suffix in (".so", ".pxd", ".pyi", ".h", "py.typed"):
    assert any(name.endswith(suffix) for name in names), f"the wheel has no {suffix}"
assert not [name for name in names if name.endswith(".pyx")], "the wheel carries Cython sources"
PY
"$python" -m venv clean
clean/bin/pip install -q --disable-pip-version-check wheel/*.whl
clean/bin/python -c 'import pagecore; b = pagecore.Bitmap(100); b.set_range(3, 5); print(pagecore.__version__, b.runs().tolist())'
said=$(clean/bin/python -m pagecore 2>&1 || true)    # it fails, and says how to mend that
[[ $said == *"pagecore[cli]"* ]] || { echo "the command does not say which extra it needs: $said"; exit 1; }
