#!/bin/sh
# What the headers' self-test runs on beside this machine: AArch64 under qemu-user, and musl. Installed as root on Debian;
# elsewhere the tests that need them skip and say so.
set -eu
missing=""
command -v aarch64-linux-gnu-gcc >/dev/null 2>&1 || missing="$missing gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
command -v qemu-aarch64-static >/dev/null 2>&1 || missing="$missing qemu-user-static"
command -v musl-gcc >/dev/null 2>&1 || missing="$missing musl-tools"
[ -z "$missing" ] && exit 0
# Where they cannot be installed, the tests that need them skip and say so.
# shellcheck disable=SC2086 # a list of packages
sh "$(dirname "$0")/install-packages.sh" "the headers' self-test runs on this machine alone" $missing || true
