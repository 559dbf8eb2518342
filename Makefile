# Every target installs into .venv first if needed. PYTHON makes the environment; TORCH_INDEX names another package index for
# torch alone, such as PyTorch's own one of builds without CUDA, which are much smaller.
PYTHON ?= python3
TORCH_INDEX ?=
TEST_WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PINNED = $(shell sed -n 's/^$(1)==/$(1)==/p' constraints.txt)
# The suite on the CPU sees no GPU: where there is one, kernels would not run in Triton's interpreter.
TEST_ENVIRONMENT := CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow coverage test-gpu test-multigpu test-faults test-slurm test-hosts test-browser check docs recall recall-gpu bench bench-train kernel-report clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|' 2>/dev/null || sed -n 's/^\([a-z-]*\):.*## /  make \1: /p' Makefile

install: $(STAMP)  ## Make .venv with the tested versions (constraints.txt)

# torch goes first and alone, because deepspeed's build imports it; deepspeed's own operators are not built (DS_BUILD_OPS=0)
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "error: Python 3.11 or newer is needed, $(PYTHON) is %d.%d; choose another: make install PYTHON=/path/to/python3.11" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'error: no venv was made; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	$(BIN)/python -m pip install --upgrade pip $(call PINNED,setuptools) $(call PINNED,wheel)
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(call PINNED,torch)
	$(BIN)/python -m pip install -c constraints.txt numpy packaging ninja psutil py-cpuinfo pydantic hjson msgpack tqdm einops
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -c constraints.txt --no-build-isolation $(call PINNED,deepspeed)
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,dev]'
	@touch $(STAMP)

quickstart: $(STAMP)  ## A whole small run on this CPU, from corpus to samples
	DS_ACCELERATOR=cpu $(BIN)/python -m dla_train.quickstart

test: $(STAMP)  ## Run the test suite on the CPU
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile -m 'not slow and not gpu and not slurm and not hosts and not browser'

test-slow: $(STAMP)  ## Run the rest of it: every layout, engine and fault
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile -m 'slow and not gpu and not slurm and not hosts and not browser'

coverage: $(STAMP)  ## Run both, and say how much of each package it ran; writes docs/results/
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile -m 'not gpu and not slurm and not hosts and not browser' --cov --cov-report=
	$(BIN)/python -m tests.coverage_page

test-gpu: $(STAMP)  ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu

test-multigpu: $(STAMP)  ## Compare training on all CUDA devices with one
	$(BIN)/python -m pytest -q -m gpu tests/parallel

test-faults: $(STAMP)  ## Kill, stop, damage and hang small runs (half an hour)
	$(TEST_ENVIRONMENT) $(BIN)/python -m tests.faults.suite --output docs/results --rounds 4

test-slurm: $(STAMP)  ## Runs and sweeps on a SLURM of this machine (root; installs it)
	@$(BIN)/python -m tests.slurm.packages
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q -m slurm tests/slurm

test-hosts: $(STAMP)  ## Two hosts of this machine that lose each other (root)
	@$(BIN)/python -m tests.launch.hosts
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q -m hosts tests/launch

test-browser: $(STAMP)  ## The page of dla-inspect in Chromium
	@$(BIN)/python -m tests.inspect_memory.browser
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q -m browser tests/inspect_memory

check: $(STAMP) docs  ## Lint, formatting, types, and the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)  ## Build the documentation into build/site
	$(BIN)/mkdocs build

bench: $(STAMP)  ## Measure speed side by side; writes docs/results/
	DS_ACCELERATOR=cpu $(BIN)/python -m dla_train.bench

bench-train: $(STAMP)  ## Measure training steps on one GPU; writes docs/results/
	$(BIN)/python -m dla_train.bench training
	$(BIN)/python -m dla_train.bench render

recall: $(STAMP)  ## Compare memories on a recall task (a quarter of an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m dla_train.recall.command study=paired_token

recall-gpu: $(STAMP)  ## The same on multi-query recall, on one GPU
	$(BIN)/python -m dla_train.recall.command study=mqar device=cuda processes=12

kernel-report: $(STAMP)  ## Compile every Triton kernel for sm80 and sm90, GPU or not
	PYTHONPATH=kernels $(BIN)/python -m dla_kernels.build_report --output docs/results

clean:  ## Remove build products and caches
	rm -rf build/lib build/bdist.* dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
