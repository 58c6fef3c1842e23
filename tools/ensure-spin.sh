#!/bin/sh
# See that spin and a C compiler are here, for spec/check.py. What is missing is installed as root on Debian, and
# otherwise named with the command that installs it.
set -eu
missing=""
command -v spin >/dev/null 2>&1 || missing="$missing spin"
command -v gcc >/dev/null 2>&1 || missing="$missing gcc libc6-dev"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing:$missing"
    apt-get update -q >/dev/null
    # shellcheck disable=SC2086 # a list of packages
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing >/dev/null
else
    echo "the models cannot be checked yet; install what is missing, on Debian or Ubuntu with:" >&2
    echo "    sudo apt-get install$missing" >&2
    exit 1
fi
