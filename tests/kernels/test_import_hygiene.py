"""What importing adazeta_kernels brings in, and what it leaves alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import adazeta_kernels

ROOT = Path(adazeta_kernels.__file__).parent


CODE = """
import json, sys, torch

def touched(*args, **kwargs):
    raise SystemExit("CUDA was touched")

def state():
    return torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()

torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = torch.cuda.current_device = touched
torch.manual_seed(3)
before = state()

import adazeta_kernels as k
layout = k.TTAdapterLayout.auto(24, 8, 2)
theta = torch.zeros(layout.numel)
k.perturb_([theta], k.derive_seeds(1, 0, 2), [1.0, 0.5])
k.tt_adapter(torch.zeros(1, 1, 24), k.tt_factors(theta, layout, [1], [0.0]), layout)

modules = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"modules": modules, "cuda": torch.cuda.is_initialized(), "state kept": before == state()}))
"""


@pytest.fixture(scope="module")
def fresh_process():
    """What a new process finds after importing the package and calling it."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_brings_in_nothing_of_models(fresh_process):
    modules = set(fresh_process["modules"])
    above = {"adazeta", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "datasets", "triton"}
    assert "adazeta_kernels" in modules and not modules & above


def test_touches_no_gpu(fresh_process):
    assert fresh_process["cuda"] is False


def test_leaves_global_generator_and_settings_alone(fresh_process):
    assert fresh_process["state kept"] is True


def test_public_names_are_the_ones_promised():
    assert sorted(adazeta_kernels.__all__) == [
        "Segment",
        "TTAdapterLayout",
        "TTShape",
        "backends",
        "derive_seed",
        "derive_seeds",
        "derive_seeds_of_steps",
        "explain",
        "fill_normal_",
        "low_rank_linear",
        "perturb_",
        "tt_adapter",
        "tt_factors",
        "tt_linear",
    ]
    for name in adazeta_kernels.__all__:
        assert getattr(adazeta_kernels, name) is not None


@pytest.mark.parametrize(
    "name", ["fill_normal_", "perturb_", "tt_factors", "tt_adapter", "tt_linear", "low_rank_linear"]
)
def test_docstrings_have_every_section(name):
    text = getattr(adazeta_kernels, name).__doc__
    sections = ("Args:", "Returns:", "Raises:", "Numerics:", "Source:")
    missing = [s for s in sections if s not in text and not (name == "perturb_" and s == "Returns:")]
    assert not missing
    if name.endswith("_"):
        assert "in place" in text.partition("\n")[0]


def test_sources_do_not_mention_the_packages_above():
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        for package in ("adazeta", "transformers", "peft"):
            assert (
                f"import {package}\n" not in text and f"from {package} " not in text and f"from {package}." not in text
            ), path
