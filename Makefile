# Commands for people who work on this repository; `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_ARGS ?=
TUNE_ARGS ?=
GPU_ARGS ?=
REBASE_ARGS ?=

RUN = $(VENV)/bin/python

.PHONY: help venv setup model demo serve tune-demo gpu-check gpu-bench lint test rebase upstream-check clean

help:
	@echo "make setup   virtual environment $(VENV) with this sglang and its dependencies (first time: 11 GB, minutes)"
	@echo "make model   the small real model of the demo and the tests, in .cache/models"
	@echo "make demo    serve it with the quantized cache, ask a question, show what the cache costs (DEMO_ARGS=...)"
	@echo "make serve   the same, and keep serving until Ctrl-C"
	@echo "make tune-demo  find per-layer bits for that model, under 20 minutes on 2 cores (TUNE_ARGS=...)"
	@echo "make gpu-check  does this card run the kernels right? PYTHON needs torch and triton, not sglang (GPU_ARGS=...)"
	@echo "make gpu-bench  how fast does it run them? the same needs (GPU_ARGS=...); docs/gpu_checks.md has both"
	@echo "make lint    ruff, mypy and clang-format over this repository's own files"
	@echo "make test    lint, and all tests; PYTEST_ARGS='test/srt -k name' chooses, '-m \"not server\"' leaves out the slow ones"
	@echo "make upstream-check  upstream's releases above the pinned one"
	@echo "make rebase VERSION=0.5.24  try that release: what is missing, changed, new, and whether it starts (REBASE_ARGS=--write)"
	@echo "make clean   remove the environment and everything that was built; .cache/wheels and models too"
	@echo
	@echo "PYTHON=$(PYTHON) makes the environment; VENV=$(VENV) is where. Without an NVIDIA GPU the portable CPU build"
	@echo "of sgl_kernel is installed, with one the published CUDA build."

venv: setup

setup:
	$(PYTHON) scripts/setup_venv.py --venv $(VENV)

model: setup
	$(RUN) scripts/make_smollm2.py

demo: setup
	$(RUN) scripts/demo.py $(DEMO_ARGS)

serve: setup
	$(RUN) scripts/demo.py --serve $(DEMO_ARGS)

tune-demo: setup
	$(RUN) scripts/tune_demo.py $(TUNE_ARGS)

# Without setup: they run where there is no package index, and no sglang.
gpu-check:
	$(PYTHON) scripts/gpu_check.py $(GPU_ARGS)

gpu-bench:
	$(PYTHON) scripts/gpu_bench.py $(GPU_ARGS)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	git ls-files 'sgl-kernel/*.h' 'sgl-kernel/*.cpp' 'sgl-kernel/*.cuh' 'sgl-kernel/*.cu' 'test/harness/device/*.h' 'test/harness/device/*.cpp' | xargs $(VENV)/bin/clang-format --dry-run --Werror

test: lint
	$(RUN) -m pytest -ra $(PYTEST_ARGS)

upstream-check: setup
	$(RUN) python/upstream/fork.py releases

rebase: setup
	$(RUN) python/upstream/fork.py rebase $(or $(VERSION),$(error VERSION is missing: make rebase VERSION=0.5.24)) $(REBASE_ARGS)

clean:
	rm -rf $(VENV) .cache build dist .pytest_cache sgl-kernel/portable/build sgl-kernel/portable/*.egg-info
	find scripts test python sgl-kernel -name __pycache__ -type d -prune -exec rm -rf {} +
