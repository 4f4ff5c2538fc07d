#!/usr/bin/env bash
# Everything that wants a GPU, in one command: builds with CUDA, runs the GPU tests, compute-sanitizer on small shapes,
# and the benchmarks. Results go to benchmarks/results/<gpu>/ with the command, the versions and the commit.
#
#   scripts/gpu_session.sh [--no-build]
#
#   PYTHON=python3                  with a CUDA build of torch, pybind11, cmake, ninja, pytest and pytest-benchmark
#   ADAZETA_GPU_ELEMENTS=1000000000 elements of the large comparison with the CPU
#
# Exit status: 0 when tests and sanitizers are clean. Every step runs, whatever the one before it said.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
command -v nvidia-smi > /dev/null || { echo "gpu_session: nvidia-smi is missing: no GPU driver here" >&2; exit 2; }
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader -i 0 | tr ' ' '-' | tr -cd 'A-Za-z0-9-')
stamp=$(date -u +%Y%m%dT%H%M%SZ)
results=benchmarks/results/$gpu
mkdir -p "$results"
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}
export ADAZETA_CACHE=$PWD/$results  # the configurations of Triton kernels that were chosen on this GPU

if [ "${1:-}" != --no-build ]; then
  cmake -S . -B build/gpu -G Ninja -DADAZETA_BUILD_CUDA=1 -DPython_EXECUTABLE="$(command -v "$python")" \
    "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)" && cmake --build build/gpu || exit 1
fi

declare -A outcome
step() { # name, command ...
  local name=$1
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$results/$stamp-$name.log"
  outcome[$name]=${PIPESTATUS[0]}
}

step tests "$python" -m pytest -q -m gpu tests/kernels tests/training
if command -v compute-sanitizer > /dev/null; then
  # Small shapes: the sanitizers slow kernels down a hundredfold. Streams and capture are not their business.
  chosen="perturb or tt_ or low_rank or misaligned or split or (fill_normal and not many)"
  for tool in memcheck racecheck initcheck; do
    step "$tool" env ADAZETA_GPU_ELEMENTS=100000 PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name regex:adazeta \
      "$python" -m pytest -q -m gpu tests/kernels/test_gpu.py -k "$chosen"
  done
else
  echo "gpu_session: compute-sanitizer is missing; the sanitizers did not run" >&2
  outcome[sanitizers]=127
fi
step launch "$python" benchmarks/bench_launch.py --json "$results/$stamp-launch.json"
step benchmarks "$python" -m pytest benchmarks/bench_cuda.py benchmarks/bench_triton.py benchmarks/bench_step.py \
  --benchmark-only -q \
  "--benchmark-json=$results/$stamp-benchmarks.json"

OUTCOME=$(for name in "${!outcome[@]}"; do echo "$name=${outcome[$name]}"; done) \
  "$python" - "$results/$stamp-session.json" "scripts/gpu_session.sh $*" << 'PY'
import json
import os
import platform
import subprocess
import sys

import torch


def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"


path, command = sys.argv[1:]
session = {
    "command": command.strip(),
    "commit": output("git", "rev-parse", "HEAD"),
    "changed_files": output("git", "status", "--short", "--untracked-files=no").splitlines(),
    "gpu": torch.cuda.get_device_name(),
    "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"),
    "nvcc": output("nvcc", "--version").splitlines()[-1],
    "torch": torch.__version__,
    "python": platform.python_version(),
    "exit_status": {name: int(code) for name, code in (line.split("=") for line in os.environ["OUTCOME"].split())},
}
with open(path, "w") as file:
    json.dump(session, file, indent=2)
print(json.dumps(session, indent=2))
PY

for name in "${!outcome[@]}"; do
  [ "${outcome[$name]}" -eq 0 ] || { echo "gpu_session: $name failed (${outcome[$name]})" >&2; failed=1; }
done
exit "${failed:-0}"
