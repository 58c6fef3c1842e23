#!/bin/sh
# Print the first Python that is new enough: the one asked for, python3, or a versioned name.
for candidate in "$@" python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        command -v "$candidate"
        exit 0
    fi
done
echo "pagecore needs Python 3.11 or newer; install it (Debian: apt-get install python3) or run: make PYTHON=/path/to/python" >&2
echo python3
