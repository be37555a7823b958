# Everything here works on a machine with Python 3.11 and pip; nothing is installed outside this folder.
PYTHON ?= python3
UV_VERSION := 0.13.9
UV := PYTHONPATH=.tools $(PYTHON) -m uv
PY := .venv/bin/python
SEEDS ?= 0
RUN_DIR ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: help setup demo quick fix test test-slow test-rewards test-environments lint types check paper-shapes paper-page gpu bench bench-objectives chaos audit docs docs-serve clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: .venv/.ready  ## make the environment in .venv

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}: use make PYTHON=python3.11 ...")'
	@test -d .tools/uv || $(PYTHON) -m pip install --quiet --disable-pip-version-check --target .tools uv==$(UV_VERSION)
	@test -x $(PY) || $(UV) venv --quiet --python $(PYTHON) .venv
	@echo "installing packages (a few GB the first time) ..."
	@$(UV) pip install --quiet --compile-bytecode --python $(PY) --editable . --group dev
	@touch $@

demo: setup  ## train on the embedded pipeline, compare base and tuned images (minutes, no GPU)
	@$(PY) -m texforce_ray.run --config configs/shapes.yaml run_dir=$(RUN_DIR)

quick: setup  ## tests without Ray and without whole runs: two minutes
	@OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -n 2 --dist loadscope tests/unit tests/records -m "not long and not slow and not gpu and not weights and not ray and not network"

fix: setup  ## format, and fix what ruff can
	@.venv/bin/ruff check --fix --quiet . && .venv/bin/ruff format --quiet .

# Passive: threads of two processes would wait for each other by spinning.
test: setup  ## all tests but the slow ones
	@OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -n 2 --dist loadscope --durations=15 -m "not slow and not gpu and not weights and not environments"

test-slow: setup  ## also the slow ones, minutes each
	@$(PY) -m pytest -m "not gpu and not weights and not environments"

test-rewards: setup  ## rewards in environments of their own; several GB
	@$(PY) -m pytest -m environments tests/rewards

test-environments: setup  ## also exported files and the product in the oldest libraries
	@$(PY) -m pytest -m environments tests/rewards tests/compat

lint: setup  ## ruff
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .

types: setup  ## mypy
	@.venv/bin/mypy

docs: setup  ## build the documentation into build/site; warnings are errors
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

docs-serve: setup  ## serve it on http://127.0.0.1:8000 while writing
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs serve --strict

check: lint types test  ## what CI runs, but for test-rewards

paper-shapes: setup  ## the paper's experiments on the embedded pipeline: over an hour; docs/results/shapes.md
	@$(PY) -m texforce_ray.experiments shapes --seeds $(SEEDS)

paper-page: setup  ## rewrite that page from the kept results
	@$(PY) -m texforce_ray.experiments shapes --page-only

bench-objectives: setup  ## all objectives compared: a day on two cores, resumes; docs/results/objectives.md
	@$(PY) benchmarks/objectives.py

gpu: setup  ## on one GPU, without Ray or downloads: tests, gradients, images, speed (SIZE=tiny: on a CPU)
	@PYTHON=$(PY) bash benchmarks/gpu.sh

bench: setup  ## all measurements: benchmarks/results/bench.md and bench.json
	@$(PY) benchmarks/run_all.py

chaos: setup  ## 300 faults of all kinds and tables of the results; an hour, resumes where it stopped
	@$(PY) tests/chaos/drill.py --faults 260 --out runs/chaos
	@$(PY) tests/chaos/drill.py --faults 48 --embedded --out runs/chaos-embedded
	@$(PY) tests/chaos/torture.py --kills 200
	@$(PY) tests/chaos/soak.py --iterations 500
	@$(PY) -W ignore tests/fuzz/fuzz.py --inputs 3000

audit: setup  ## known vulnerabilities of the pinned packages (needs the network)
	@$(UV) pip freeze --python $(PY) --exclude-editable > .tools/frozen.txt && $(UV) tool run pip-audit --disable-pip --no-deps -r .tools/frozen.txt

clean:  ## remove the environment and caches; runs/ stays
	rm -rf .venv .tools .mypy_cache .ruff_cache .pytest_cache build dist
