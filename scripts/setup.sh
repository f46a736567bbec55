#!/bin/sh
# Makes .venv with everything that requirements.lock names. Sourced by the other scripts; quick when nothing has changed.
set -eu
cd "$(dirname "$0")/.."

python=
for name in python3.14 python3.13 python3.12 python3.11 python3 python; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$name
        break
    fi
done
if [ -z "$python" ]; then
    echo "incidentd: Python 3.11 or later is needed and not on the PATH: install it, then run this again" >&2
    exit 1
fi

wanted=$(cat requirements.lock pyproject.toml | cksum)
if [ "$(cat .venv/made-from 2>/dev/null)" != "$wanted" ]; then
    echo "setting up .venv (once)" >&2
    rm -rf .venv
    if ! "$python" -m venv .venv; then
        echo "incidentd: $python cannot make virtual environments: on Debian and Ubuntu, apt install python3-venv" >&2
        exit 1
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
    printf '%s' "$wanted" >.venv/made-from
fi
