#!/bin/sh
# ip and tc, for the test of a migration between two network namespaces. Installed as root on Debian; elsewhere the test
# skips and says so.
set -eu
if command -v ip >/dev/null 2>&1 && command -v tc >/dev/null 2>&1; then
    exit 0
fi
sh "$(dirname "$0")/install-packages.sh" "no guest is moved between network namespaces" iproute2 || true
