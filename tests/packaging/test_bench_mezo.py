"""docs/kernels.md shows the code that is measured, both steps do what they say, and the benchmark writes its table."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adazeta_kernels import fill_normal_

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
SOURCE = ROOT / "benchmarks" / "baselines" / "mezo.py"


def steps():
    spec = importlib.util.spec_from_file_location("mezo", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_what_is_measured():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert block.startswith("@torch.no_grad()\n") and block in SOURCE.read_text(encoding="utf-8")


def test_files_that_the_page_names_exist():
    for path in re.findall(r"(?:benchmarks|scripts|adazeta_kernels)/\w+\.py", PAGE):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("name", ["plain_step", "perturb_step"])
def test_both_steps_follow_the_difference_of_their_losses(name):
    """Along its own noise, each moves the parameters by ``-lr (l+ - l-) / 2 eps``."""
    lr, eps, seed = 0.1, 0.01, 7
    torch.manual_seed(0)
    model, batch = torch.nn.Linear(5, 3), torch.randn(4, 5)
    sizes = [p.numel() for p in model.parameters()]
    before = [p.detach().flatten().clone() for p in model.parameters()]
    if name == "plain_step":
        torch.manual_seed(seed)
        z = [torch.normal(0.0, 1.0, p.shape).flatten() for p in model.parameters()]
    else:
        z = fill_normal_(torch.empty(sum(sizes)), seed).split(sizes)

    def at(scale):
        weight, bias = (old + scale * noise for old, noise in zip(before, z))
        return torch.nn.functional.linear(batch, weight.view(3, 5), bias).square().mean()

    gradient = (at(eps) - at(-eps)) / (2 * eps)
    loss = getattr(steps(), name)(model, lambda model, batch: model(batch).square().mean(), batch, lr, eps, seed)
    torch.testing.assert_close(loss, at(eps))
    assert abs(gradient) > 0.1
    for p, old, noise in zip(model.parameters(), before, z):
        torch.testing.assert_close(p.detach().flatten(), old - lr * gradient * noise, atol=1e-4, rtol=0)


def test_the_benchmark_runs_and_writes_its_table(tmp_path):
    result, page = tmp_path / "mezo.json", tmp_path / "kernels.md"
    page.write_text(PAGE)
    command = [sys.executable, "benchmarks/bench_mezo.py", "--little", "--model", "opt-125m", "--rows", "1"]
    command += ["--tokens", "4", "--device", "cpu", "--json", str(result), "--page", str(page)]
    environment = os.environ | {"ADAZETA_BENCH_ROUNDS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    records = json.loads(result.read_text())
    assert [record["dtype"] for record in records] == ["float32", "bfloat16"]
    assert all(record["times_step"] > 0 and 0 < record["share"] for record in records)
    written = page.read_text()
    rows = written.split("<!-- mezo -->")[1].split("<!-- end mezo -->")[0].strip().splitlines()
    assert len(rows) == 4 and rows[2].startswith("| opt-125m | float32 |")
    assert written.startswith(PAGE.split("<!-- mezo -->")[0]) and written.endswith(PAGE.split("<!-- end mezo -->")[1])
