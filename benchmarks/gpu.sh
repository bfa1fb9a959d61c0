#!/usr/bin/env bash
# All GPU rows in one call of under ten minutes, for a machine without a network:
#
#     bash benchmarks/gpu.sh [--wheels FOLDER] [--out FOLDER] [--python PYTHON]
#                            [--only forward|pipeline] [OPTIONS OF EXTRACT.PY]
#
# IEEE fp32, torch's default fp32 (TF32 convolutions), tf32, fp16 and bf16: the forward pass against
# its peers, then JPEGs to a cache at fp32 and fp16. Results as those of extract.py, in FOLDER
# (benchmarks/results by default), written after every precision: what takes longer than its share
# is ended, and what was done before it is kept. --only gives one part all the time. The FOLDER of
# --wheels holds a wheel of efficientnet_pytorch, which is put on Python's path; nothing is
# installed. Without CUDA the script says so and exits with 0.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=python3 wheels='' only='' out="$here/results"
while [[ $# -gt 0 ]]; do
    case $1 in
        --wheels) wheels=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        --python) python=$2; shift 2 ;;
        --only) only=$2; shift 2 ;;
        *) break ;;
    esac
done
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
if [[ -n $wheels ]]; then
    unpacked=$(mktemp -d)
    trap 'rm -rf "$unpacked"' EXIT
    for wheel in "$wheels"/*.whl; do
        case ${wheel##*/} in
            efficientnet_*) "$python" -m zipfile -e "$wheel" "$unpacked" ;;
        esac
    done
    export PYTHONPATH="$unpacked:$PYTHONPATH"
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "no CUDA here: nothing measured"
    exit 0
fi

run() {  # SECONDS, then options: a part that fails or takes too long does not stop the next
    local limit=$1 status=0
    shift
    timeout --kill-after=10 "$limit" \
        "$python" "$here/extract.py" --device cuda --out "$out" "$@" || status=$?
    [[ $status -eq 0 ]] || echo "extract.py $*: exit status $status (124: out of time)"
}

if [[ $only != pipeline ]]; then
    run "$([[ -n $only ]] && echo 570 || echo 390)" --parts forward --backbones efficientnet-b0 \
        --precision fp32,fp16,default,tf32,bf16 --rounds 3 --seconds 0.5 --batch-sizes 64,256 \
        --compile-batch-sizes 256 \
        --ways "featcache,stock,timm tf_efficientnet_b0 eager,timm efficientnet_b0" "$@"
fi
if [[ $only != forward ]]; then
    pngs=$([[ -n $only ]] && echo 500 || echo 0)
    run "$([[ -n $only ]] && echo 570 || echo 180)" --parts pipeline --precision fp16,fp32 \
        --rounds 2 --seconds 0.5 --jpegs 2000 --pngs "$pngs" --stock-images 1000 "$@"
fi
ls -l "$out"
