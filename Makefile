# Targets with a `##` comment are what `make help` lists.
#
#   TORCH=2.11.0     another torch than the newest, in .venv
#   SYSTEM=1         the interpreter and torch that are there; installs nothing but the package
#   PYTHON=python3   the interpreter for .venv, or with SYSTEM=1 the one to use
#   ARGS="-k plan"   more arguments for pytest, the demo or the benchmark
#   WERROR=1         compiler warnings are errors
#   ARC_TOPK_CUDA=0  without CUDA kernels; they are built where nvcc is found
#   ARC_TOPK_CUDA_ARCHS="80;90"   GPUs to compile for; default: this machine's, or 90

PYTHON ?= python3
TORCH ?=
SYSTEM ?=
ARGS ?=
WERROR ?= 0
# Several ranks share one machine in the tests and the demo; threads of each would only get in the way.
export OMP_NUM_THREADS ?= 1

VENV := .venv
ifneq ($(filter-out 0,$(SYSTEM)),)
  PY := $(PYTHON)
  STAMPS := build/stamps$(subst /,-,$(shell command -v $(PYTHON)))
  DEPENDENCIES :=
  INTEGRATIONS :=
  EVIDENCE :=
  export ARC_TOPK_TESTS := optional
else
  PY := $(VENV)/bin/python
  STAMPS := $(VENV)/stamps
  DEPENDENCIES := $(STAMPS)/requirements $(STAMPS)/torch-$(or $(TORCH),newest)
  INTEGRATIONS := $(STAMPS)/integrations
  EVIDENCE := $(STAMPS)/evidence
  export ARC_TOPK_TESTS := required
  export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
endif
export ARC_TOPK_WERROR := $(WERROR)
# One architecture, for speed; `pip install` makes all of them.
ifeq ($(ARC_TOPK_CUDA_ARCHS)$(TORCH_CUDA_ARCH_LIST),)
  GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -xE '[0-9]+[.][0-9]' | sort -u)
  export ARC_TOPK_CUDA_ARCHS := $(or $(GPUS),90)
endif
PIP := $(PY) -m pip --disable-pip-version-check --quiet
CPP_FILES = $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help test test-slow test-cpp test-integrations soak asan fuzz tsan gpu-check golden registers demo bench evidence lint format build clean distclean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "%-22s %s\n", $$1, $$2 }'
	@sed -n '/^# *[A-Z_]*=/s/^# */  /p' Makefile

test: build test-cpp ## set up, build, run the C++ and the Python tests
	$(PY) -m pytest $(ARGS)

test-slow: build ## the tests that take minutes
	$(PY) -m pytest -m slow $(ARGS)

test-integrations: build $(INTEGRATIONS) ## Lightning, Accelerate, Transformers, FSDP2: the README's recipes
	$(PY) -m pytest tests/integrations $(ARGS)

soak: build ## 10,000 steps of each error feedback, with everything at once (ARGS="--steps 1000": 2 minutes)
	$(PY) tests/python/soak.py $(ARGS)

test-cpp: build ## the C++ tests alone
	@if [ -x build/bin/arc_topk_tests ]; then set -ex; build/bin/arc_topk_tests --gtest_brief=1; \
	build/bin/arc_topk_races --gtest_brief=1; \
	else echo "No GoogleTest here: the C++ tests are left out."; fi

# Builds of their own, without CUDA: `make asan` runs every C++ test and then real DDP, `make tsan` the
# C++ tests that have threads. Leaks are looked for in the C++ tests alone: Python keeps what it likes.
# OMP_NUM_THREADS is 1 (above): OpenMP's runtime is not instrumented, its threads would seem to race.
SANITIZED = cmake --log-level=WARNING -S . -B build/$@ -G Ninja -DPython_EXECUTABLE=$(shell $(PY) -c 'import sys; print(sys.executable)') \
  -DCMAKE_BUILD_TYPE=Sanitize -DARC_TOPK_SANITIZE=$(1) -DARC_TOPK_TESTS=required -DARC_TOPK_CUDA=0 \
  -DARC_TOPK_WERROR=$(WERROR)
LIBRARIES_FIRST = LD_PRELOAD="$(foreach name,libasan.so libstdc++.so.6,$(shell g++ -print-file-name=$(name)))"

asan: $(DEPENDENCIES) ## C++ tests, and real DDP for a minute, under AddressSanitizer and UBSan
	$(call SANITIZED,address)
	cmake --build build/asan --target arc_topk_tests _C
	ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 build/asan/tests/cpp/arc_topk_tests --gtest_brief=1
	@mkdir -p build/asan/python/arc_topk/reference build/asan/python/arc_topk/checkpoint
	cp arc_topk/*.py build/asan/_C*.so build/asan/_built_for_torch.txt build/asan/python/arc_topk/
	cp arc_topk/reference/*.py build/asan/python/arc_topk/reference/
	cp arc_topk/checkpoint/*.py build/asan/python/arc_topk/checkpoint/
	$(LIBRARIES_FIRST) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONPATH=build/asan/python $(PY) tests/python/sanitized.py

# Into the build that `make asan` has made, or makes.
FUZZ ?= 10000
fuzz: asan ## FUZZ (10000) configurations, shapes, steps and checkpoints by chance, under AddressSanitizer and UBSan
	ARC_TOPK_FUZZ=$(FUZZ) ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  build/asan/tests/cpp/arc_topk_tests --gtest_brief=1 --gtest_filter='Fuzz.*'
	$(LIBRARIES_FIRST) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONPATH=build/asan/python $(PY) tests/python/fuzz.py $(FUZZ)
	$(LIBRARIES_FIRST) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONPATH=build/asan/python $(PY) tests/python/fuzz_checkpoint.py $(FUZZ)

tsan: $(DEPENDENCIES) ## C++ tests that have threads, under ThreadSanitizer
	$(call SANITIZED,thread)
	cmake --build build/tsan --target arc_topk_tests
	TSAN_OPTIONS="halt_on_error=0 suppressions=tests/cpp/tsan.supp" setarch -R build/tsan/tests/cpp/arc_topk_tests --gtest_brief=1

# It builds by itself, so that a build that fails is one line of its table.
gpu-check: $(DEPENDENCIES) ## all that needs a GPU, in 15 minutes: table and JSON in OUT (build/gpu-check)
	$(PY) tests/gpu/check.py $(ARGS)

golden: build ## record the hashes of results anew: see tests/python/test_golden.py
	$(PY) tests/python/test_golden.py

registers: build ## registers and spills of every CUDA kernel, without a GPU
	$(PY) tests/python/cubin.py

demo: build ## train a language model over 4 ranks with each compressor: a table and a picture
	$(PY) examples/train_ddp.py --demo $(ARGS)

bench: build ## cost of the hook against its floor, a Python hook and PowerSGD
	$(PY) benchmarks/compare.py $(ARGS)

evidence: build $(EVIDENCE) ## loss against bytes for every method, resumable: docs/results.md (ARGS=--list: the plan)
	PYTHONPATH=benchmarks $(PY) -m evidence $(ARGS)

lint: $(DEPENDENCIES) ## clang-format, ruff and mypy
	clang-format --dry-run --Werror $(CPP_FILES)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

format: $(DEPENDENCIES) ## put all sources into the form that lint wants
	clang-format -i $(CPP_FILES)
	$(PY) -m ruff check --fix-only
	$(PY) -m ruff format

build: $(STAMPS)/package ## the quickest rebuild: compile what has changed, into arc_topk/ and build/bin/
	@$(PY) setup.py --quiet build_ext --inplace

clean: ## remove what was built
	rm -rf build arc_topk/*.so arc_topk/_built_for_torch.txt *.egg-info

distclean: clean ## remove .venv too
	rm -rf $(VENV)

# --- set-up: a stamp for each step, so that a second call does nothing -----------------------------------

# Built before pip does it, which would show nothing for the minutes it takes; pip then finds it done.
$(STAMPS)/package: pyproject.toml setup.py $(DEPENDENCIES)
	$(PY) setup.py --quiet build_ext --inplace
	$(PIP) install --no-build-isolation --no-deps --editable .
	@mkdir -p $(@D) && touch $@

# The stamps lie inside .venv: another PYTHON clears them with it.
PYTHON_STAMP := $(VENV)/stamps/python$(subst /,-,$(patsubst python%,%,$(PYTHON)))
$(PYTHON_STAMP):
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info[:2] <= (3, 13) or sys.exit( \
	  "arc-topk needs Python 3.10 to 3.13 (got " + sys.version.split()[0] + "): choose one with PYTHON=")'
	$(PYTHON) -m venv --clear $(VENV)
	@mkdir -p $(@D) && touch $@

$(VENV)/stamps/requirements: $(wildcard requirements/*.txt) $(PYTHON_STAMP)
	$(PIP) install -r requirements/dev.txt
	@touch $@

$(VENV)/stamps/integrations $(VENV)/stamps/evidence: $(VENV)/stamps/%: requirements/%.txt $(DEPENDENCIES)
	$(PIP) install -r $<
	@touch $@

# One torch at a time: its stamp replaces that of another.
$(VENV)/stamps/torch-%: $(VENV)/stamps/requirements
	$(PIP) install $(if $(filter newest,$*),--upgrade torch,torch==$*)
	@rm -f $(@D)/torch-* && touch $@
