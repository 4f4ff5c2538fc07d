# make demo | test | lint | bench | clean. Needs Python 3.10 or later, g++ and make; everything else goes into .venv.
#
#   PYTHON=python3.12         which Python makes .venv
#   TORCH=torch==2.13.0       which torch is installed first
#   PYTEST_ARGS="-k spec"     more arguments for pytest
#   ADAZETA_BUILD_CUDA=0|1    without or with CUDA (default: with it when nvcc works)
#   CI=1                      test also style, builds, the oldest Triton, and more configurations of its kernels
#   ADAZETA_AOT=all           compile every Triton kernel that may run, for four GPUs (half an hour)

PYTHON ?= python3
# By name and before everything else: a range would take the newest torch, which may bring gigabytes of CUDA packages.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OLDEST_TRITON := build/triton-3.6.0
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test lint bench clean

demo: $(VENV)/.installed
	$(BIN)/adazeta demo

# CI runs the tests in two processes, each with one thread: twice as many threads as cores would wait for one another.
# In the order of files, not of their number of tests: the longest files hold few.
ifdef CI
test: PYTEST_ARGS += -n 2 --dist loadfile --no-loadscope-reorder
test: export OMP_NUM_THREADS := 1
# tests/kernels/test_cuda_compile.py compiles for every GPU that is meant; the build itself then needs one.
test: export CMAKE_ARGS ?= -DCMAKE_CUDA_ARCHITECTURES=90
test: export ADAZETA_TEST_TRITON ?= $(OLDEST_TRITON)
test: $(OLDEST_TRITON)/.installed
endif
test: $(VENV)/.installed
	$(BIN)/python -m pytest -q --durations=15 $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

bench: $(VENV)/.installed
	mkdir -p benchmarks/results/local
	$(BIN)/python -m pytest benchmarks --benchmark-only -q \
		--benchmark-json=benchmarks/results/local/$(shell date -u +%Y%m%dT%H%M%SZ).json $(PYTEST_ARGS)

clean:
	rm -rf build dist *.egg-info python/*.egg-info .pytest_cache .ruff_cache .benchmarks $(VENV)
	rm -f adazeta_kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Two stamps, so that a change in csrc/ rebuilds the extension without asking a package index again.
$(VENV)/.base:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python 3.10 or later is needed, {sys.executable} is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(TORCH)
	$(PIP) install -q "setuptools>=77" "pybind11>=2.13" "cmake>=3.22" ninja
	touch $@

$(VENV)/.installed: $(VENV)/.base $(SOURCES)
	$(PIP) install -q --no-build-isolation -e ".[test,dev]"
	touch $@

$(OLDEST_TRITON)/.installed: $(VENV)/.base
	$(PIP) install -q --no-deps --target $(OLDEST_TRITON) triton==3.6.0
	touch $@
