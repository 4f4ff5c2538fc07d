#!/usr/bin/env bash
# Builds and installs the package in the ways a user may, each into a throwaway environment, and imports it from outside
# the source tree.
#
#   scripts/check_packaging.sh [--full]    quick: a wheel, and what is refused; --full: every combination (about ten minutes)
#
# Dependencies are borrowed from .venv (`make test` makes it), so that torch is not installed again for each.
set -euo pipefail
cd "$(dirname "$0")/.."

root=$PWD
python=$root/.venv/bin/python
[ -x "$python" ] || { echo "check_packaging: no .venv; run 'make test' first" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# A copy of what is committed or would be: a build in the tree itself could pick up what lies about there.
source=$work/source
mkdir "$source"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$source" 2>/dev/null || true

new_environment() { # path, "tools" to offer the build tools of .venv
  "$python" -m venv --without-pip "$1"
  # The dependencies as a plain folder on the path: the editable install that .venv holds of this package stays inactive.
  echo "$site" > "$1/lib/$(ls "$1/lib")/site-packages/borrowed.pth"
}

check_import() { # environment, expected CUDA: yes, no or any
  (cd "$work" && "$1/bin/python" - "$1" "$2" "$root" <<'PY'
import sys
from pathlib import Path

import torch

import adazeta_kernels
from adazeta.tasks.templates import entries
from adazeta_kernels import _native

where, cuda, root = sys.argv[1:]
module = Path(_native.__file__).resolve()
assert Path(root) not in module.parents, f"imported from the source tree: {module}"
assert "sst2" in entries(), "templates.yaml was left out"
backends = adazeta_kernels.backends()
assert backends["native"] is None, backends
assert backends["reference"] is None, backends
assert cuda == "any" or _native.cuda_built() == (cuda == "yes"), (cuda, _native.cuda_built())
native = adazeta_kernels.fill_normal_(torch.empty(1000), 7, backend="native")
assert torch.equal(native, adazeta_kernels.fill_normal_(torch.empty(1000), 7, backend="reference"))
assert not torch.cuda.is_initialized(), "importing must not touch a GPU"
PY
  )
}

has_nvcc() { command -v "${CUDACXX:-nvcc}" > /dev/null; }

build() { # wheel|editable, isolated|plain, ADAZETA_BUILD_CUDA
  local name=$1-$2-$3 flags=() cuda=any
  local environment=$work/env-$name tree=$work/tree-$name
  [ "$2" = plain ] && flags=(--no-build-isolation)
  [ "$3" = 0 ] && cuda=no
  [ "$3" = 1 ] && cuda=yes
  new_environment "$environment"
  cp -r "$source" "$tree"
  printf '%-28s' "$name"
  local start=$SECONDS log=$work/log-$name
  (
    cd "$tree"
    export ADAZETA_BUILD_CUDA=$3 PATH=$root/.venv/bin:$PATH
    if [ "$1" = wheel ]; then
      "$environment/bin/python" -m pip wheel -q --no-deps "${flags[@]}" -w "$work/dist-$name" .
      "$environment/bin/python" -m pip install -q --no-deps --force-reinstall "$work/dist-$name"/*.whl
    else
      "$environment/bin/python" -m pip install -q --no-deps --force-reinstall "${flags[@]}" -e .
    fi
  ) > "$log" 2>&1 || { echo "FAILED"; cat "$log"; exit 1; }
  [ "$1" = wheel ] && rm -rf "$tree"
  check_import "$environment" "$cuda"
  echo "ok, $((SECONDS - start)) s"
}

expect_failure() { # name, words of the message, environment variables...
  local name=$1 words=$2 environment=$work/env-$1 log=$work/log-$1
  shift 2
  new_environment "$environment"
  cp -r "$source" "$work/tree-$name"
  printf '%-28s' "$name"
  if (cd "$work/tree-$name" && env "$@" "$environment/bin/python" -m pip wheel -q --no-deps --no-build-isolation \
      -w "$work/dist-$name" .) > "$log" 2>&1; then
    echo "FAILED: was built, expected an error with: $words"
    exit 1
  fi
  grep -q "$words" "$log" || { echo "FAILED: expected an error with: $words"; cat "$log"; exit 1; }
  echo "ok, refused as expected"
}

# Without optimisation, where the way of building matters and not its speed.
[ "${1:-}" = --full ] || export CMAKE_ARGS=-DCMAKE_CXX_FLAGS_RELEASE=-O0
build wheel isolated 0  # .venv itself holds an editable build, with CUDA where nvcc works
expect_failure cuda-without-nvcc "no working nvcc was found" ADAZETA_BUILD_CUDA=1 CUDACXX=/nonexistent/nvcc
expect_failure bad-cuda-value "expected auto, 0 or 1" ADAZETA_BUILD_CUDA=maybe
if [ "${1:-}" = --full ]; then
  for kind in wheel editable; do
    for isolation in isolated plain; do
      for cuda in 0 auto 1; do
        [ "$cuda" = 1 ] && ! has_nvcc && { echo "$kind-$isolation-1: left out, no nvcc here"; continue; }
        case $kind-$isolation-$cuda in wheel-isolated-0) continue ;; esac
        build "$kind" "$isolation" "$cuda"
      done
    done
  done
fi
echo "packaging: all as expected"
