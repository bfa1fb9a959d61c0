#!/usr/bin/env bash
# Format, lint, types and tests, from nothing but Python 3.11+: bash scripts/test.sh [PYTEST ARGS]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/venv.sh"
make_venv dev
cd "$root"
"$python" -m ruff format --check .
"$python" -m ruff check .
# Types are checked while the tests begin: mypy uses one core for most of a minute.
"$python" -m mypy &
types=$!
# A third of the tests' time is waiting for processes, so there is one worker more than cores. A
# file's tests stay in one worker: they share what is slow to make. Files in the order of conftest.
workers=$(("$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')" + 1))
tests=0
"$python" -m pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder "$@" || tests=$?
wait "$types"
exit "$tests"
