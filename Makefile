# Everything from a fresh clone: `make test`, `make demo`. Needs Python 3.11+ (venv), make and a
# C++ compiler; the rest, CMake and Ninja included, is installed into .venv at the versions of constraints.txt.
#
#   PYTHON=python3.12   interpreter that makes the environment
#   VENV=path           where the environment lives (default .venv)
#   BPW=0.55            bits per weight of `make demo`
#   MINUTES=60          time that it quantizes for (default 3); a longer one gives a better model
#   WHEEL_TORCH=2.11.0  versions of torch that `make wheels` tries its wheels with (default: that of constraints.txt)
#   WHEEL_CUDA=90       `make wheels` makes a second wheel, with CUDA kernels for these GPU architectures (all: every one)
#   PYTEST_ARGS=...     extra arguments of pytest in `make test` and `make test-slow`
#   TEST_PROCESSES=1    how many processes share its files (default: one for each core)
#   MATRIX=...          rows of `make test-matrix` (default: all)
#   TASKS=path          environment of `make test-tasks` (default .venv-tasks)
#   SERVING=path        environment of `make test-serving` (default .venv-serving)
#   SERVING_ONLY=group  run only the groups of `make test-serving` whose names hold this, such as eager or sglang
#
# pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS, ...) select where packages come from, for instance a
# CPU-only or a CUDA build of torch.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Each step uses every core by itself, and the order of the output is part of `make test`.
.NOTPARALLEL:

PYTHON ?= python3
VENV ?= .venv
SERVING ?= .venv-serving
TASKS ?= .venv-tasks
PYTEST_ARGS ?=
WHEEL_CUDA ?=
# nproc answers OMP_NUM_THREADS where that is set.
CORES := $(shell env -u OMP_NUM_THREADS nproc)
TEST_PROCESSES ?= $(CORES)

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMPS := $(VENV)/.stamps
export PATH := $(abspath $(VENV))/bin:$(PATH)

BUILD_INPUTS := $(shell find csrc cmake -type f) CMakeLists.txt setup.py littlebit2_kernels/version.py \
  $(wildcard python/*littlebit2_autoregister*)
CXX_FILES := $(shell find cmake csrc tests/cpp examples benchmarks -type f \
  \( -name '*.h' -o -name '*.c' -o -name '*.cc' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)

# The CUDA kernels are compiled by pytest (tests/kernels/test_cuda_build.py); ctest executes them on the host.
CORE_ONLY := -G Ninja -DLB2_BUILD_TESTS=ON -DLB2_BUILD_TORCH=OFF -DLB2_BUILD_PYTHON=OFF -DLB2_CUDA=off
comma := ,

# $(call quietly,LOG,COMMAND): run COMMAND with its output in LOG, and show the log only if it fails.
quietly = mkdir -p $(dir $(1)); { $(2); } >$(1) 2>&1 || { status=$$?; cat $(1); exit $$status; }

# $(call ctest,FOLDER,OPTIONS): build the C and C++ tests in build/FOLDER, and run them.
define ctest
@$(call quietly,build/$(1)/configure.log,cmake -S . -B build/$(1) $(CORE_ONLY) $(2))
@$(call quietly,build/$(1)/build.log,cmake --build build/$(1))
@ctest --test-dir build/$(1) --output-on-failure --output-junit results.xml --no-tests=error --parallel $(CORES)
endef

# "+" joins what one build can have.
sanitized = $(call ctest,sanitize-$(1),-DCMAKE_BUILD_TYPE=RelWithDebInfo -DLB2_TEST_CUDA=ON -DLB2_SANITIZE=$(subst +,$(comma),$(1)))

# One thread for each process, because the processes fill the cores already.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

.PHONY: help venv build wheels test test-slow test-matrix test-families test-serving test-tasks test-arm arm-tools pytest pytest-slow ctest \
  sanitize sanitize-sample demo lint format docs clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- environment: one stamp per set of packages ------------------------------------------------------

$(STAMPS)/venv:
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' not found; install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is required, got $$($(PYTHON) -V 2>&1); name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make environments; on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# torch goes first: with everything else resolved around it, pip never replaces it by another build.
$(STAMPS)/base: $(STAMPS)/venv constraints.txt pyproject.toml .ci/requirements.py
	@echo "installing torch and the build tools into $(VENV)"
	@$(PIP) install -qq -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@$(PY) .ci/requirements.py >$(STAMPS)/base.txt
	@$(PIP) install -qq -c constraints.txt -r $(STAMPS)/base.txt
	@touch $@

$(STAMPS)/dev $(STAMPS)/demo $(STAMPS)/docs $(STAMPS)/wheels: $(STAMPS)/%: $(STAMPS)/base
	@echo "installing the packages for $* into $(VENV)"
	@$(PY) .ci/requirements.py $* >$(STAMPS)/$*.txt
	@$(PIP) install -qq -c constraints.txt -r $(STAMPS)/$*.txt
	@touch $@

venv: $(STAMPS)/dev ## create the environment with all development packages

# --- build -------------------------------------------------------------------------------------------

# The stamp lies in build/ so that `make clean`, which removes the libraries, also forgets that they were built.
build/.built: $(STAMPS)/base $(BUILD_INPUTS)
	@echo "building the native libraries"
	@$(call quietly,build/pip-build.log,$(PIP) install --verbose --no-build-isolation -c constraints.txt -e .)
	@touch $@

build: build/.built ## compile the native libraries and install the package in place

# Compiled against glibc and libstdc++ of this machine, and audited for those of manylinux_2_28; torch is the user's.
WHEEL_PLATFORM := manylinux_2_28_$(shell uname -m)

# $(call make_wheel,NAME,VARIABLES): build a wheel with these variables of the environment, audit it.
define make_wheel
@rm -rf build/lib.*
@$(call quietly,build/wheels/$(1)/build.log,$(2) $(PIP) wheel --verbose --no-deps --no-build-isolation -w build/wheels/$(1) .)
@$(call quietly,build/wheels/$(1)/repair.log,$(VENV)/bin/auditwheel repair --plat $(WHEEL_PLATFORM) --only-plat --exclude libtorch_cpu.so \
  --exclude 'liblittlebit2*' -w dist/wheels build/wheels/$(1)/littlebit2_kernels-*.whl)
endef

# Its version ends in that of CUDA, as +cu130: pip tells it from the other one by that.
CUDA_WHEEL := LB2_CUDA=on LB2_CUDA_ARCHS='$(filter-out all,$(WHEEL_CUDA))' \
  LB2_LOCAL_VERSION="$$($${CUDACXX:-nvcc} --version | sed -nE 's/.* release ([0-9]+)\.([0-9]+),.*/cu\1\2/p')"

wheels: export LB2_PORTABLE := ON
wheels: $(STAMPS)/wheels ## make a wheel for every CPython from 3.11 on (CPU; WHEEL_CUDA=all: another), audit it, try it without a compiler
	$(if $(WHEEL_CUDA),@command -v "$${CUDACXX:-nvcc}" >/dev/null || { echo "error: WHEEL_CUDA needs nvcc on the PATH$(comma) or CUDACXX=its path" >&2; exit 1; })
	@rm -rf build/wheels dist/wheels && mkdir -p dist/wheels
	@echo "building the wheel"
	$(call make_wheel,cpu,LB2_CUDA=off)
	$(if $(WHEEL_CUDA),@echo "building the wheel with CUDA kernels ($(WHEEL_CUDA)): about ten minutes of one core for each architecture; progress is in build/wheels/cuda/build.log")
	$(if $(WHEEL_CUDA),$(call make_wheel,cuda,$(CUDA_WHEEL)))
	@for wheel in dist/wheels/*.whl; do $(VENV)/bin/auditwheel show $$wheel; $(PY) .ci/wheel.py $$wheel $(WHEEL_TORCH); done

# --- checks ------------------------------------------------------------------------------------------

test: ctest sanitize-sample pytest ## run the tests: C and C++, the same under sanitizers, Python

test-slow: sanitize sanitize-thread pytest-slow ## run what `make test` leaves out: exhaustive sweeps, ThreadSanitizer

# What executes CUDA kernels on the host is left out: it takes too long in an emulator.
CORE_TESTS := -DCMAKE_BUILD_TYPE=Release -DLB2_TEST_CUDA=OFF
test-arm: $(STAMPS)/base arm-tools ## cross-compile the core for 64-bit ARM, test it under qemu, compare its bits with this machine's
	@echo "== ctest, this machine"
	$(call ctest,native,$(CORE_TESTS))
	@echo "== ctest, 64-bit ARM under qemu"
	$(call ctest,arm,--toolchain cmake/aarch64-linux.cmake $(CORE_TESTS))
	@$(PY) .ci/digests.py build/native build/arm

ARM_PACKAGES := g++-aarch64-linux-gnu qemu-user-static
arm-tools:
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64-static >/dev/null || { echo "error: make test-arm needs a cross compiler and an emulator; on Debian and Ubuntu: apt-get install $(ARM_PACKAGES)" >&2; exit 1; }

test-matrix: $(STAMPS)/dev build/.built ## run the Python tests in random orders, with other threads and instruction sets
	@$(PY) .ci/matrix.py --processes $(TEST_PROCESSES) $(MATRIX)

pytest: $(STAMPS)/dev build/.built ## run the Python tests
	@echo "== pytest"
	@$(PYTEST) $(PYTEST_ARGS)

pytest-slow: $(STAMPS)/dev build/.built
	@echo "== pytest, exhaustive sweeps"
	@$(PYTEST) -m slow $(PYTEST_ARGS)

# test-slow tries a sample of them; docs/models.md says how long all take.
test-families: $(STAMPS)/dev build/.built ## quantize, load and run a tiny model of every family of transformers
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) -m benchmarks families

# vLLM has an environment of its own, because it pins other versions of the same packages.
$(SERVING)/.installed: $(STAMPS)/base .ci/serving.py .ci/serving-constraints.txt constraints.txt
	@echo "installing vLLM into $(SERVING)"
	@$(PIP) install -qq -c constraints.txt packaging
	@$(PYTHON) -m venv $(SERVING)
	@$(PY) .ci/serving.py $(SERVING)/bin/python build/serving
	@touch $@

# The wheel is built and installed: what vLLM finds is its entry point. Nothing comes from the tree but the checks.
test-serving: $(SERVING)/.installed ## serve tiny packed models with vLLM and compare the tokens
	@rm -rf build/serving/dist
	@$(call quietly,build/serving/wheel.log,$(PIP) wheel --no-deps --no-build-isolation -w build/serving/dist .)
	@$(SERVING)/bin/python -m pip --disable-pip-version-check install -qq --no-deps --force-reinstall build/serving/dist/*.whl
	@env -u PYTHONPATH $(SERVING)/bin/python tests/servers/check.py --work build/serving/run --only '$(SERVING_ONLY)'

# lm-evaluation-harness and what it brings along go on top of .venv, which stays as it is. addsitedir, unlike a bare path,
# also reads the files there that put this package on the path.
$(TASKS)/.installed: $(STAMPS)/dev .ci/tasks-constraints.txt
	@echo "installing lm-evaluation-harness into $(TASKS)"
	@$(PYTHON) -m venv $(TASKS)
	@$(PY) -c 'import sysconfig; print("import site; site.addsitedir({!r})".format(sysconfig.get_path("purelib")))' >"$$($(TASKS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	@$(TASKS)/bin/python -m pip --disable-pip-version-check install -qq -c constraints.txt -c .ci/tasks-constraints.txt lm_eval
	@touch $@

test-tasks: $(TASKS)/.installed build/.built ## run lm-evaluation-harness on a tiny packed model
	@HF_HUB_OFFLINE=1 $(TASKS)/bin/python -m pytest -o addopts= tests/tasks/check_tasks.py

# The CUDA kernels run on the host, as the compiler optimizes them.
ctest: $(STAMPS)/base ## run the C and C++ tests of the torch-free core
	@echo "== ctest"
	$(call ctest,cpp,-DCMAKE_BUILD_TYPE=Release -DLB2_TEST_CUDA=ON)

sanitize: sanitize-address+undefined ## run all C and C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer

# The same programs with a part of the random problems and modes: what `make test` has time for.
sanitize-sample: export LB2_TEST_SAMPLE := 1
sanitize-sample: $(STAMPS)/base
	@echo "== ctest, sanitizer: address+undefined, a sample"
	$(call sanitized,address+undefined)

sanitize-%: $(STAMPS)/base
	@echo "== ctest, sanitizer: $*"
	$(call sanitized,$*)

lint: $(STAMPS)/dev ## check style, formatting, types and spelling
	@ruff check .
	@ruff format --check .
	@clang-format --dry-run -Werror $(CXX_FILES)
	@mypy
	@codespell

format: $(STAMPS)/dev ## rewrite sources in the project's format
	@ruff check --fix .
	@ruff format .
	@clang-format -i $(CXX_FILES)

# --- documentation ------------------------------------------------------------------------------------

# A broken link, also one to a heading, is a warning, and every warning is an error. The whole site is read again: a
# warning of a page that did not change would not be seen otherwise.
docs: $(STAMPS)/docs ## write docs/api from the docstrings, render docs/ into build/docs
	@$(PY) .ci/api_reference.py
	@$(PY) -m sphinx -q -W --keep-going -E -b html -d build/docs-cache docs build/docs
	@echo "docs: build/docs/index.html"

# --- demo --------------------------------------------------------------------------------------------

demo: $(STAMPS)/demo build/.built ## quantize a small language model and compare it with the dense one (BPW=1.0)
	@$(PY) -m benchmarks demo --bpw $(or $(BPW),1.0) --minutes $(or $(MINUTES),3)

# --- cleaning ----------------------------------------------------------------------------------------

clean: ## remove everything built, keep the environment
	@rm -rf build dist *.egg-info python/*.egg-info littlebit2_kernels/lib littlebit2_kernels/include
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find csrc littlebit2_kernels python benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
	@rm -f littlebit2_kernels/*.so

distclean: clean ## remove the environment too
	@rm -rf $(VENV)
