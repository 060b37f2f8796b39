# Two commands do everything on a fresh machine: `make bench` and `make test`. Both are safe to repeat.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TRITONS := 3.6.0 3.7.1 3.9.0  # the oldest supported, the pinned and the newest supported
SOURCES := pyproject.toml setup.py ragged_exit/ops/sources.py constraints.txt $(wildcard csrc/*)

.PHONY: bench test lint format fuzz ray peers quality aot gpu gpu-build gpu-kernels gpu-encoder gpu-tests gpu-sanitizer clean $(TRITONS:%=aot-%)

bench: $(STAMP)  ## score the embedded default, print the table, write the picture
	$(BIN)/ragged-exit bench --json ragged_exit_bench.json --plot ragged_exit_bench.png

test: $(STAMP)  ## the tests that CI runs
	$(BIN)/python -m pytest -m "not slow and not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: $(STAMP)  ## the long op suite: >= 100,000 rows an implementation
	$(BIN)/python -m pytest -s -m slow tests/fuzz

ray: $(STAMP)  ## score on a real local Ray cluster, a worker killed midway
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[ray]"
	$(BIN)/python -m pytest -m slow tests/integrations

peers: $(STAMP)  ## against other runtimes, BERT-base shapes
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[peers]"
	$(BIN)/python benchmarks/peers.py

quality: $(STAMP)  ## the quality study on DATA=folder; resumes
	$(BIN)/python benchmarks/quality.py --data $(DATA)

# Add --keep-going to see what differs under every version; AOT=--update rewrites the committed table.
AOT ?= --check
aot: $(TRITONS:%=aot-%)  ## compile every Triton kernel for sm_80 and sm_90, compare registers and spills with the table

$(TRITONS:%=aot-%): aot-%: .aot/triton-%/.installed
	PYTHONPATH=$(CURDIR)/.aot/triton-$*$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python benchmarks/aot.py $(AOT) --triton $*

.aot/triton-%/.installed: | $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) triton==$*
	touch $@

# On a CUDA machine: in place, with what is installed there; no network, no virtual environment, no git. Each part is a
# command of its own that writes into GPU_RESULTS as it goes; one that is cut off after GPU_SECONDS (0: never) keeps what
# it had. The sanitizer, slow and not supported everywhere, is not part of `make gpu`.
GPU_RESULTS ?= benchmarks/results
GPU_SECONDS ?= 560
GPU_PARTS := gpu-kernels gpu-encoder gpu-tests gpu-sanitizer
GPU_LIMIT := timeout --foreground --signal=INT --kill-after=30 $(GPU_SECONDS)
# most of the tests' time goes into compiling kernels: on several cores where pytest-xdist is installed
GPU_WORKERS = $(if $(shell $(PYTHON) -c 'import xdist; print(1)' 2>/dev/null),-n logical --maxprocesses 12 --dist worksteal)
GPU_SUITE := RAGGED_EXIT_TEST_IMPL=triton RAGGED_EXIT_TEST_DEVICE=cuda HYPOTHESIS_PROFILE=gpu

gpu:  ## the figures, then the tests; a part that fails does not stop the next
	$(MAKE) --keep-going gpu-kernels gpu-encoder gpu-tests

$(GPU_PARTS): export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
$(GPU_PARTS): export PYTHONUNBUFFERED := 1
$(GPU_PARTS): SHELL := bash
$(GPU_PARTS): gpu-build

gpu-build:
	mkdir -p $(GPU_RESULTS)
	$(PYTHON) setup.py --quiet build_ext --inplace || echo "the CPU kernels are not built; the GPU's do not need them"

gpu-kernels:
	$(GPU_LIMIT) $(PYTHON) benchmarks/gpu_kernels.py --json $(GPU_RESULTS)/kernels-gpu.json

gpu-encoder:
	$(GPU_LIMIT) $(PYTHON) benchmarks/gpu.py --json $(GPU_RESULTS)/encoder-gpu.json

gpu-tests:  ## tests/gpu, and the op suite of tests/ops on the Triton kernels
	set -o pipefail; $(GPU_LIMIT) env -u TRITON_INTERPRET $(GPU_SUITE) $(PYTHON) -m pytest -v --tb=short $(GPU_WORKERS) \
		-k "(gpu or triton) and not sanitizer" tests/gpu tests/ops 2>&1 | tee $(GPU_RESULTS)/tests-gpu.log

gpu-sanitizer:  ## compute-sanitizer over every op
	set -o pipefail; $(GPU_LIMIT) $(PYTHON) -m pytest -v -s tests/gpu/test_gpu_sanitizer.py 2>&1 | tee $(GPU_RESULTS)/sanitizer-gpu.log

$(STAMP): $(SOURCES)
	@echo "creating $(VENV) and installing ragged-exit with its pinned dependencies"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench,train,test,lint,kernels]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) .aot build *.egg-info ragged_exit/_native*.so
