#!/usr/bin/env bash
# The whole path on phantom X-rays, from nothing but Python 3.11+: bash scripts/demo.sh [DIR]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/venv.sh"
make_venv demo
"$python" -m featcache demo "${1:-demo}" "${@:2}"
say ""
bin=${python%/*}
say "To have the command featcache at hand: source ${bin#"$PWD"/}/activate"
