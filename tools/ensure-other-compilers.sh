#!/bin/sh
# What the headers' self-test runs on beside this machine: AArch64 under qemu-user, and musl. Installed as root on Debian;
# elsewhere the tests that need them skip and say so.
set -eu
missing=""
command -v aarch64-linux-gnu-gcc >/dev/null 2>&1 || missing="$missing gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
command -v qemu-aarch64-static >/dev/null 2>&1 || missing="$missing qemu-user-static"
command -v musl-gcc >/dev/null 2>&1 || missing="$missing musl-tools"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing:$missing"
    apt-get update -q >/dev/null
    # shellcheck disable=SC2086 # a list of packages
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing >/dev/null
else
    echo "the headers' self-test runs on this machine alone; for more, on Debian or Ubuntu:" >&2
    echo "    sudo apt-get install$missing" >&2
fi
