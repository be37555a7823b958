#!/usr/bin/env bash
# All measurements that need a GPU, in one call, on the plain classes (no Ray):
#   PYTHON=python3 OUT=results bash benchmarks/gpu.sh
# Needs torch, diffusers, transformers, peft and this package's light dependencies. SIZE=tiny tries
# the same commands in seconds on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
SIZE=${SIZE:-sd15}
OUT=${OUT:-benchmarks/results}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"
if [ "$SIZE" = sd15 ]; then
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$OUT/device.csv"
  samples=32 rounds=1
else
  samples=16 rounds=1
fi
"$PYTHON" benchmarks/released.py --size "$SIZE" --no-ray --samples $samples --rounds $rounds
"$PYTHON" benchmarks/utilisation.py --size "$SIZE"
"$PYTHON" benchmarks/numerics.py
"$PYTHON" benchmarks/growth.py --rounds 1
"$PYTHON" benchmarks/rewards.py
if [ "$OUT" != benchmarks/results ]; then cp benchmarks/results/*.json benchmarks/results/*.md "$OUT"; fi
