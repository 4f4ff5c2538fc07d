#!/usr/bin/env bash
# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: builds the extension with both, next to a copy
# of the Python package in a throwaway folder, and runs the kernel tests on it. Outputs are poisoned there as in every
# test (tests/conftest.py), so an element that is not written fails too.
#
#   scripts/check_sanitizers.sh [pytest arguments]
#
# Needs .venv (`make test` makes it) and g++.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-$PWD/.venv/bin/python}
[ -x "$(command -v "$python")" ] || { echo "check_sanitizers: no $python; run 'make test' first" >&2; exit 1; }
asan=$("${CXX:-g++}" -print-file-name=libasan.so)
[ -e "$asan" ] || { echo "check_sanitizers: ${CXX:-g++} has no libasan.so" >&2; exit 1; }
work=$PWD/build/sanitize
rm -rf "$work/adazeta_kernels" && mkdir -p "$work"
export PATH=$(dirname "$(command -v "$python")"):$PATH  # cmake and ninja of .venv

cp -r adazeta_kernels "$work/"
rm -f "$work"/adazeta_kernels/*.so
cmake -S . -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DADAZETA_SANITIZE=ON -DADAZETA_BUILD_CUDA=0 \
  "-DADAZETA_OUTPUT_DIR=$work/adazeta_kernels" "-DPython_EXECUTABLE=$(command -v "$python")" \
  "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)" > "$work/configure.log" ||
  { cat "$work/configure.log" >&2; exit 1; }
cmake --build "$work/build" > "$work/build.log" || { cat "$work/build.log" >&2; exit 1; }

export PYTHONPATH=$work:$PWD/python  # before what .venv holds
# Python itself never frees everything. Torch's own libraries come uninstrumented: container checks would misfire.
export ASAN_OPTIONS=detect_leaks=0:detect_container_overflow=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1
# libstdc++ too: the runtime looks its throw up when it starts.
export LD_PRELOAD="$asan $("${CXX:-g++}" -print-file-name=libstdc++.so.6)" OMP_NUM_THREADS=2
# From elsewhere, so that Python does not find the package of the working tree first.
root=$PWD
cd "$work"
"$python" - "$work" <<'PY'
import sys

from adazeta_kernels import _native

assert _native.__file__.startswith(sys.argv[1]), f"the module under test is {_native.__file__}"
PY
tests=(test_checks test_fill_normal test_low_rank_linear test_native_tt test_perturb test_tt_adapter test_tt_factors
  test_tt_linear)
files=("${tests[@]/#/$root/tests/kernels/}")
# Gradients come from the reference, in Python.
"$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" "${files[@]/%/.py}" \
  -k "not gradient" "$@"
