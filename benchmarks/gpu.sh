#!/usr/bin/env bash
# Tests, training, MFU and sampling on a GPU, in at most nine minutes and without network access:
#
#   benchmarks/gpu.sh                          writes benchmarks/results/gpu-*.json
#   benchmarks/gpu.sh --tiny --device cpu      tries every part with tiny shapes on a CPU
#   benchmarks/gpu.sh --only 'train.*compiled' some parts only; `gpu.py` has the list
#
# BUDGET sets the seconds, PYTHON the interpreter.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
BUDGET=${BUDGET:-530}
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec timeout -k 10 "$BUDGET" "$PYTHON" benchmarks/gpu.py --seconds $((BUDGET - 15)) "$@"
