#!/bin/sh
# See that a Python can make environments and build extensions here. What is missing is installed as root on Debian,
# and otherwise named with the command that installs it.
set -eu
python=$1
missing=""
command -v cc >/dev/null 2>&1 || missing="$missing gcc libc6-dev"
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
header=$("$python" -c 'import os, sysconfig; print(os.path.join(sysconfig.get_path("include"), "Python.h"))')
[ -e "$header" ] || missing="$missing python3-dev"
[ -e /usr/include/linux/userfaultfd.h ] || missing="$missing linux-libc-dev"
[ -z "$missing" ] && exit 0
# shellcheck disable=SC2086 # a list of packages
sh "$(dirname "$0")/install-packages.sh" "pagecore cannot be built yet" $missing
