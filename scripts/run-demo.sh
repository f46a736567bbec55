#!/bin/sh
# Sets everything up and runs the daemon on an embedded PostgreSQL; options are those of `python -m incidentd`.
set -eu
here=$(dirname "$0")
"$here/setup.sh"
exec "$here/../.venv/bin/python" -m incidentd "$@"
