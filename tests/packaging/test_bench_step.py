"""The loss comparison in front of the step's timings: it passes for the same step and fails for any other."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import step_engines  # noqa: E402
from step_models import MODELS, build, make_batch  # noqa: E402


def sides(folder, model="llama-12l", dtype="float32"):
    base = build(model, step_engines.stored(dtype), little=True)
    ours, theirs = step_engines.pair(base, 2, folder, step_engines.LITTLE_ADAPTER, dtype)
    return ours, theirs, make_batch(base, 2, 5)


@pytest.mark.parametrize("model", sorted(MODELS))
def test_losses_of_the_published_step_are_ours(tmp_path, model):
    ours, theirs, batch = sides(tmp_path, model)
    theta = ours.optimizer.fingerprint()
    assert step_engines.compare_losses(ours, theirs, batch, 2) < 5e-4
    assert ours.optimizer.fingerprint() == theta
    assert ours.optimizer.step_index == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
def test_and_in_bfloat16(tmp_path, dtype):
    ours, theirs, batch = sides(tmp_path, dtype=dtype)
    assert 0 < step_engines.compare_losses(ours, theirs, batch, 2) < 0.05


def other_directions(seed, parameters):
    return step_engines.PublishedStep.__init__.__kwdefaults__["normals"](seed + 1, parameters)


@pytest.mark.parametrize("dtype", ["float32", "mixed", "bfloat16"])
def test_other_directions_fail(tmp_path, monkeypatch, dtype):
    ours, theirs, batch = sides(tmp_path, dtype=dtype)
    monkeypatch.setattr(step_engines, "our_normals", other_directions)
    with pytest.raises(AssertionError, match="losses differ by"):
        step_engines.compare_losses(ours, theirs, batch, 2)


def test_one_wrong_adapter_fails(tmp_path):
    ours, theirs, batch = sides(tmp_path)
    adapted = next(m for m in theirs.model.modules() if hasattr(m, "down"))
    adapted.forward = adapted.base.forward
    with pytest.raises(AssertionError, match="losses differ by"):
        step_engines.compare_losses(ours, theirs, batch, 2)


def test_nan_fails(tmp_path):
    ours, theirs, batch = sides(tmp_path)
    theirs.model.lm_head.weight[:] = float("nan")
    with pytest.raises(AssertionError, match="losses differ by nan"):
        step_engines.compare_losses(ours, theirs, batch, 2)


def test_published_step_restores_and_updates(tmp_path):
    """After `estimate` the numbers are those before, up to rounding; the update is what its formula says."""
    ours, theirs, batch = sides(tmp_path)
    theta = ours.optimizer.trainable().tensors[0].clone()
    theirs.load(theta)
    theirs.normals = step_engines.our_normals

    def flat():
        return torch.cat([p.detach().reshape(-1) for _, p in theirs.named])

    seeds = [3, 5]
    projected, losses = theirs.estimate(batch, seeds)
    torch.testing.assert_close(flat(), theta, atol=1e-6, rtol=0)
    assert losses.shape == (2, 2, 2)
    theirs.load(theta)
    theirs.lr = 0.1
    theirs.update(seeds, projected)
    parameters = [p for _, p in theirs.named]
    z = [torch.cat([part.reshape(-1) for part in step_engines.our_normals(seed, parameters)]) for seed in seeds]
    decayed = torch.cat([torch.full((p.numel(),), float("bias" not in name)) for name, p in theirs.named])
    direction = sum(d * direction for d, direction in zip(projected, z)) / 2 + theirs.weight_decay * decayed * theta
    torch.testing.assert_close(flat(), theta - 0.1 * direction, atol=1e-6, rtol=1e-5)
