#!/bin/sh
# install-packages.sh WHAT PACKAGE...: install as root on Debian; otherwise say WHAT is missing, and the command. Fails where
# nothing was installed.
set -eu
what=$1
shift
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing: $*"
    apt-get update -q >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@" >/dev/null
else
    echo "$what; install what is missing, on Debian or Ubuntu with:" >&2
    echo "    sudo apt-get install $*" >&2
    exit 1
fi
