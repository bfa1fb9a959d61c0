#!/usr/bin/env bash
# Break caches and runs in every way we know, at the full numbers: bash scripts/torture.sh [PYTEST ARGS]
# CI runs the same tests at small numbers. Power cuts and full disks need root on Linux, and skip without.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/venv.sh"
make_venv dev
cd "$root"
"$python" -m pytest --long tests/torture tests/extraction/workers tests/test_xrays.py tests/cache \
    tests/pixels/test_tiff_matrix.py tests/backbones/test_libraries.py \
    tests/backbones/test_every_network.py tests/deployment/exporting/test_eight_backbones.py "$@"
