# Each target is the only command needed on a fresh machine with Python >= 3.10 and a C++17 compiler.
#   make demo        the main job on real images, in minutes     make lint        ruff, clang-format, mypy, import-linter
#   make test        C++ tests (where GoogleTest is) and pytest  make sanitize    C++ tests under asan and ubsan, and
#   make sanitize-python  those of Python on the core; make sanitize-threads: C++ tests under ThreadSanitizer
#   make bench       the benchmarks (C++ ones: Google Benchmark) make instructions  kernels under callgrind
#   make fuzz        libFuzzer (clang) and
#   make fuzz-python atheris, on what reads strangers' bytes, FUZZ_SECONDS=600 each
#   make faults      the tests that take minutes: runs killed at random points, rounds without end
#   make clean       all that the above made
# PYTHON=python3.12 chooses the interpreter of .venv; VENV= another place for it. CUDA=ON|OFF|AUTO: does the extension
# hold the CUDA kernels (AUTO: where nvcc is); by default only where a GPU is, for they take a minute to compile.

PYTHON ?= python3
CUDA ?= $(if $(wildcard /dev/nvidia0),AUTO,OFF)
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The tests build C++ as well; pip's cmake serves where there is none, or an old one.
WITH_PATH := PATH="$(abspath $(BIN)):$$PATH"
# Where ninja is, new build folders are for it: it compiles tests and library side by side.
ifneq ($(shell command -v ninja),)
export CMAKE_GENERATOR ?= Ninja
endif
# What an installed package depends on: any of it newer than the stamp, and pip builds again.
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc cmake python/bindings -type f)
PYTHON_FILES := python tests benchmarks docs
CPP_FILES = $(shell find csrc python/bindings tests/cpp tests/fuzz examples -name '*.cc' -o -name '*.cu' -o -name '*.h' -o -name '*.c' -o -name '*.inc')

FUZZ_SECONDS ?= 600
# More of pytest's flags, for make test.
PYTEST_FLAGS ?=

.PHONY: demo test test-cpp test-python faults fuzz fuzz-python lint sanitize sanitize-python sanitize-threads build-asan bench instructions build-bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/secateur demo --out demo

test: test-cpp test-python

# Two processes of two threads each: every test says how many threads it has, and most keep one busy at best.
test-python: $(VENV)/.installed-test
	$(WITH_PATH) $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_FLAGS)

# What takes minutes: runs killed at 65 random points, more ranks, more rounds.
faults: $(VENV)/.installed-test
	$(WITH_PATH) $(BIN)/python -m pytest -m faults tests/python

# atheris has wheels for some interpreters only, so it is no dependency of the tests.
fuzz-python: $(VENV)/.installed-test
	$(PIP) install "atheris>=2.3"
	for kind in header statistics plan ratios table checkpoint search; do \
	  $(BIN)/python tests/fuzz/fuzz_readers.py $$kind $$(ls -d tests/fuzz/corpus/$$kind 2>/dev/null) -max_total_time=$(FUZZ_SECONDS) \
	    -artifact_prefix=tests/fuzz/ || exit 1; \
	done

# GoogleTest is the one thing that pip cannot bring; without it the C++ code is tested through Python alone.
test-cpp: $(VENV)/.installed-test
	@if $(WITH_PATH) cmake --preset dev > $(VENV)/cmake-dev.log 2>&1; then \
	  $(WITH_PATH) && cmake --build --preset dev --parallel $(JOBS) && ctest --preset dev --parallel $(JOBS); \
	elif grep -q GTest $(VENV)/cmake-dev.log; then \
	  echo "make: GoogleTest was not found, the C++ tests are left out"; \
	else \
	  cat $(VENV)/cmake-dev.log; exit 1; \
	fi

build-asan: $(VENV)/.installed-test
	$(WITH_PATH) && cmake --preset asan -DSECATEUR_BUILD_PYTHON=ON "-DPython_EXECUTABLE=$(abspath $(BIN)/python)" \
	  "-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)" && cmake --build --preset asan --parallel $(JOBS)

sanitize: build-asan
	$(WITH_PATH) && ctest --preset asan --parallel $(JOBS)

# What calls the core; what -k leaves out trains a model first. The interpreter is not instrumented: the sanitizers'
# library, that of the compiler which built the extension, has to be there before it, with libstdc++ for what is thrown,
# and what it never frees is not ours. Reports go to the descriptor of stderr, which pytest is not to keep.
CORE_TESTS := $(addprefix tests/python/core/test_,core.py core_properties.py eliminate.py runtime.py scores.py)
sanitize-python: build-asan
	core="$$(echo $(abspath build/asan/python/bindings)/_core*.so)" && \
	compiler="$$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' build/asan/CMakeCache.txt)" && \
	found() { file="$$("$$compiler" -print-file-name="$$1")" && [ -e "$$file" ] && echo "$$file"; } && \
	runtime="$$(found "libclang_rt.asan-$$(uname -m).so" || found libclang_rt.asan.so || found libasan.so)" && \
	export SECATEUR_CORE="$$core" PYTHONPATH="$(abspath tests/sanitize)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  LD_PRELOAD="$$runtime $$(found libstdc++.so)" && \
	$(BIN)/python -c 'import os; from secateur import _core; assert _core.__file__ == os.environ["SECATEUR_CORE"], _core' && \
	$(BIN)/python -m pytest -q --capture=sys -k "not trained and not one_shot" $(CORE_TESTS)

sanitize-threads: $(VENV)/.installed-test
	$(WITH_PATH) && cmake --preset tsan && cmake --build --preset tsan --parallel $(JOBS) && ctest --preset tsan --parallel $(JOBS)

# What is found new stays in build/fuzz/corpus, for the next run; a crash is a file build/fuzz/crash-*, and belongs into
# tests/fuzz/seeds. No allocation is to be larger than 64 MiB.
fuzz: $(VENV)/.installed-test
	$(WITH_PATH) && cmake --preset fuzz && cmake --build --preset fuzz --parallel $(JOBS)
	@for fuzzer in fuzz_c_interface fuzz_model_file; do \
	  mkdir -p build/fuzz/corpus/$$fuzzer; \
	  build/fuzz/tests/fuzz/$${fuzzer}_fuzzer -max_total_time=$(FUZZ_SECONDS) -timeout=30 -malloc_limit_mb=64 \
	    -max_len=8192 -print_final_stats=1 -print_funcs=0 -verbosity=0 -artifact_prefix=build/fuzz/ build/fuzz/corpus/$$fuzzer \
	    tests/fuzz/seeds/$$fuzzer || exit 1; \
	done

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(wildcard $(PYTHON_FILES))
	$(BIN)/ruff format --check $(wildcard $(PYTHON_FILES))
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: build-bench $(VENV)/.installed-bench
	@if [ -x build/bench/benchmarks/cpp/bench_kernels ]; then \
	  build/bench/benchmarks/cpp/bench_kernels; \
	else \
	  echo "make: Google Benchmark was not found, the kernels' benchmarks are left out"; \
	fi
	$(BIN)/python -m pytest --benchmark-only --benchmark-enable benchmarks/python

instructions: build-bench
	$(BIN)/python benchmarks/cpp/instructions.py build/bench/benchmarks/cpp/count_kernels

build-bench: $(VENV)/.installed-test
	$(WITH_PATH) && cmake --preset bench && cmake --build --preset bench --parallel $(JOBS)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "make: Python 3.10 or newer is needed (PYTHON=...)")'
	$(PYTHON) -m venv $(VENV)

# Built in isolation, in place: pip brings scikit-build-core, pybind11 and, where they are missing, cmake and ninja.
# dev and bench hold all of test.
$(VENV)/.installed-%: $(SOURCES) | $(VENV)/bin/python
	@echo "make: installing secateur[$*] in $(VENV)"
	@$(PIP) install --config-settings=cmake.define.SECATEUR_CUDA=$(CUDA) --editable ".[$*]" $(if $(filter demo,$*),,"cmake>=3.25")
	@touch $@ $(if $(filter dev bench,$*),$(VENV)/.installed-test)

clean:
	rm -rf $(VENV) build demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
