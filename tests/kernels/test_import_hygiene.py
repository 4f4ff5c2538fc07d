"""What importing adazeta_kernels brings in, and what it leaves alone."""

import subprocess
import sys
from pathlib import Path

import pytest

import adazeta_kernels

ROOT = Path(adazeta_kernels.__file__).parent


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


USE = """
import sys, torch, adazeta_kernels as k
layout = k.TTAdapterLayout.auto(24, 8, 2)
theta = torch.zeros(layout.numel)
k.perturb_([theta], k.derive_seeds(1, 0, 2), [1.0, 0.5])
k.tt_adapter(torch.zeros(1, 1, 24), k.tt_factors(theta, layout, [1], [0.0]), layout)
"""


def test_importing_and_using_brings_in_nothing_of_models():
    out = run(USE + "print(sorted({m.partition('.')[0] for m in sys.modules}))")
    modules = set(eval(out))
    assert "adazeta_kernels" in modules
    assert not modules & {
        "adazeta",
        "transformers",
        "peft",
        "accelerate",
        "safetensors",
        "tokenizers",
        "datasets",
        "triton",
    }


def test_importing_touches_no_gpu():
    code = """
import torch
def touched(*args, **kwargs):
    raise SystemExit("CUDA was touched")
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = torch.cuda.current_device = touched
"""
    assert run(code + USE + "print(torch.cuda.is_initialized())").strip() == "False"


def test_importing_leaves_the_global_generator_and_threads_alone():
    code = """
import torch
torch.manual_seed(3)
def state():
    return torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
before = state()
"""
    assert run(code + USE + "print(before == state())").strip() == "True"


def test_public_names_are_the_ones_promised():
    assert sorted(adazeta_kernels.__all__) == [
        "Segment",
        "TTAdapterLayout",
        "TTShape",
        "backends",
        "derive_seed",
        "derive_seeds",
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
