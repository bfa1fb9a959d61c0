#!/usr/bin/env bash
# Format, lint, types and tests, from nothing but Python 3.11+: bash scripts/test.sh [PYTEST ARGS]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/venv.sh"
make_venv dev
cd "$root"
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m mypy
# A file's tests stay in one process: they share what is slow to make. Files in the order of conftest.
"$python" -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
