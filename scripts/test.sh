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
# Hundreds of tests are processes of their own, and each would compile the package again.
unset PYTHONDONTWRITEBYTECODE
# Each process that runs tests, and their children, have a thread per core. These wait asleep, not
# spinning: 31 CPU seconds in place of 71 for eleven tests of small networks.
export OMP_WAIT_POLICY=PASSIVE
# One process more than cores, as a fifth of the time of two is spent waiting: for timeouts, for
# signals, for children. On two noisy cores 9:46 to 10:41 min, with two processes 10:05.
workers=$("$python" -c 'from featcache.runtime import available_cores; print(available_cores() + 1)')
# A file's tests stay in one process: they share what is slow to make. Files in the order of conftest.
tests=0
# Three processes that start at once would each compile all that the tests import: in a new clone 22
# CPU seconds each. What stays is read by all.
[ -d tests/__pycache__ ] || "$python" -m pytest --collect-only --quiet >/dev/null || true
"$python" -m pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder "$@" || tests=$?
wait "$types"
exit "$tests"
