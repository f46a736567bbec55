#!/bin/sh
# Sets everything up, then checks the style and runs the tests; options are pytest's.
set -eu
cd "$(dirname "$0")/.."
scripts/setup.sh
.venv/bin/python -m ruff check
.venv/bin/python -m ruff format --check
.venv/bin/python -m mypy
exec .venv/bin/python -m pytest "$@"
