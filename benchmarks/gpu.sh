#!/usr/bin/env bash
# All that needs a GPU, in one call, on the plain classes (no Ray):
#   PYTHON=python3 OUT=results bash benchmarks/gpu.sh
# Nothing is downloaded; packages that are missing are named. SIZE=tiny runs the same on a CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
SIZE=${SIZE:-sd15}
OUT=${OUT:-benchmarks/results}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
mkdir -p "$OUT" benchmarks/results

needed="torch diffusers transformers peft accelerate safetensors numpy scipy PIL pyarrow pydantic omegaconf httpx rich"
missing=$("$PYTHON" - $needed <<'PY'
import importlib.util, sys
print(" ".join(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
PY
) || exit 1
if [ -n "$missing" ]; then
  echo "packages that are missing for $PYTHON: $missing" >&2
  exit 1
fi

status=0
step() {  # what is measured last must not be lost with what fails first
  echo "== $*"
  local began=$SECONDS
  "$@" || { echo "FAILED: $*" >&2; status=1; }
  echo "== $((SECONDS - began)) s"
}

if [ "$SIZE" = sd15 ]; then
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$OUT/device.csv"
  samples=32 compile=--compile flow=sd35 batch=16
else
  samples=16 compile= flow=tiny-flow batch=4
fi
if "$PYTHON" -c "import pytest, pytest_timeout" 2>/dev/null; then
  step "$PYTHON" -m pytest -q tests/gpu
else
  echo "packages that are missing for tests/gpu: pytest, pytest-timeout"
fi
step "$PYTHON" benchmarks/truth.py --size "$SIZE" $compile
step "$PYTHON" benchmarks/released.py --size "$SIZE" --no-ray --samples $samples --rounds 1
kept=learner.gradient_checkpointing=false
step "$PYTHON" benchmarks/utilisation.py --size "$SIZE"
step "$PYTHON" benchmarks/utilisation.py --batches $batch --size "$flow" $kept
for size in "$SIZE" "$flow"; do
  step "$PYTHON" benchmarks/utilisation.py --batches $batch --size "$size" --title "$size-compiled" $kept model.compile=true
done
step "$PYTHON" benchmarks/numerics.py
if [ "$OUT" != benchmarks/results ]; then cp benchmarks/results/*.json benchmarks/results/*.md "$OUT"; fi
echo "results in $OUT"
exit $status
