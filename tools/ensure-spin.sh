#!/bin/sh
# See that spin and a C compiler are here, for spec/check.py. What is missing is installed as root on Debian, and
# otherwise named with the command that installs it.
set -eu
missing=""
command -v spin >/dev/null 2>&1 || missing="$missing spin"
command -v gcc >/dev/null 2>&1 || missing="$missing gcc libc6-dev"
[ -z "$missing" ] && exit 0
# shellcheck disable=SC2086 # a list of packages
sh "$(dirname "$0")/install-packages.sh" "the models cannot be checked yet" $missing
