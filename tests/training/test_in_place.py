"""Perturbation in place: the chain's bits, its passes, the way back, and how far it drifts."""

import runpy
import signal
from pathlib import Path

import pytest
import torch
from tiny import lm_batch, tiny_adapted, tiny_llama

import adazeta.in_place
from adazeta import ZerothOrder
from adazeta.in_place import InPlace
from adazeta.losses import lm_loss
from adazeta_kernels import derive_seeds, perturb_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def calls(monkeypatch):
    """The seeds and scales of every ``perturb_``, and how many numbers it passed over."""
    seen = []

    def counted(params, seeds, scales, **settings):
        seen.append((list(seeds), list(scales), sum(p.numel() for p in params)))
        perturb_(params, seeds, scales, **settings)

    monkeypatch.setattr(adazeta.in_place, "perturb_", counted)
    return seen


def parameters(dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(0.02 * torch.randn(shape, generator=g)).to(dtype) for shape in ((5, 7), (3,), (), (0, 4), (130,))]


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_chain_is_this_sequence_of_perturb_calls(dtype, distribution, calls):
    """Signs flip by twice eps of the same seed; the next seed comes with the last one's undoing, in one pass."""
    params, by_hand = parameters(dtype), parameters(dtype)
    steps = [([3], [0.01]), ([3], [-0.02]), ([3, 8], [0.01, 0.01]), ([8], [-0.02]), ([8], [0.01])]
    with InPlace(params, offset=5, distribution=distribution) as others:
        for k, (seed, scale) in enumerate([(3, 0.01), (3, -0.01), (8, 0.01), (8, -0.01)]):
            others.move_to(seed, scale)
            perturb_(by_hand, *steps[k], offset=5, distribution=distribution)
            assert all(map(torch.equal, params, by_hand))
    perturb_(by_hand, *steps[-1], offset=5, distribution=distribution)
    assert all(map(torch.equal, params, by_hand))
    assert [call[:2] for call in calls] == steps


def test_in_float32_the_chain_has_the_bits_of_restoring_every_time():
    """``perturb_`` sums in float32, so a pass with two seeds rounds as two passes do."""
    params, by_hand = parameters(torch.float32), parameters(torch.float32)
    with InPlace(params) as others:
        for seed in range(4):
            others.move_to(seed, 0.01)
            others.move_to(seed, -0.01)
    for seed in range(4):
        for scale in (0.01, -0.02, 0.01):
            perturb_(by_hand, [seed], [scale])
    assert all(map(torch.equal, params, by_hand))


@pytest.mark.parametrize("difference, probes", [("central", 6), ("forward", 3)])
def test_an_estimate_of_p_probes_is_p_plus_1_passes_over_the_parameters(calls, difference, probes):
    model = tiny_llama()
    opt = ZerothOrder(model, lr=0.0, queries=3, difference=difference, perturb="in-place")
    opt.estimate(lm_loss, lm_batch(4))
    assert len(calls) == probes + 1
    assert all(numel == sum(p.numel() for p in model.parameters()) for _, _, numel in calls)


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_parameters_of_an_estimate_by_hand(dtype):
    model, by_hand, batch = tiny_llama().to(dtype), tiny_llama().to(dtype), lm_batch(4)
    opt = ZerothOrder(model, lr=0.0, eps=0.01, queries=2, combine="mean", perturb="in-place")
    opt.estimate(lm_loss, batch)
    params, (a, b), differences = list(by_hand.parameters()), derive_seeds(0, 0, 2), []
    with torch.no_grad():
        for first, second in ((([a], [0.01]), ([a], [-0.02])), (([a, b], [0.01, 0.01]), ([b], [-0.02]))):
            losses = []
            for seeds, scales in (first, second):
                perturb_(params, seeds, scales)
                losses.append(lm_loss(by_hand, batch).double().mean())
            differences.append((losses[0] - losses[1]) / (2 * 0.01))
        perturb_(params, [b], [0.01])
    assert torch.equal(opt._projected[0], torch.stack(differences))
    assert all(map(torch.equal, model.parameters(), params))


def test_the_way_back_is_taken_when_the_loss_raises(calls):
    model = tiny_llama()
    before = [p.clone() for p in model.parameters()]
    evaluated = []

    def fail(m, rows):
        evaluated.append(lm_loss(m, rows))
        if len(evaluated) == 3:
            raise KeyError("loss")
        return evaluated[-1]

    opt = ZerothOrder(model, eps=0.05, queries=4, perturb="in-place")
    with pytest.raises(KeyError):
        opt.estimate(fail, lm_batch(4))
    first, second = derive_seeds(0, 0, 2)
    assert [seeds for seeds, _, _ in calls] == [[first], [first], [first, second], [second]]
    for p, old in zip(model.parameters(), before):
        torch.testing.assert_close(p, old, atol=3e-7, rtol=0)
    opt.estimate(lm_loss, lm_batch(4))  # and the next estimate begins at theta
    assert calls[4][0] == [first]


def test_ctrl_c_within_a_pass_waits_for_its_end(monkeypatch, ctrl_c):
    """Where a pass is interrupted that has written, nobody knows where the parameters are."""
    model = tiny_llama()
    before = [p.clone() for p in model.parameters()]
    passes = []

    def interrupted(*args, **settings):
        perturb_(*args, **settings)
        passes.append(args)
        if len(passes) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(adazeta.in_place, "perturb_", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        ZerothOrder(model, eps=0.05, queries=2, perturb="in-place").estimate(lm_loss, lm_batch(4))
    assert len(passes) == 3 and signal.getsignal(signal.SIGINT) is handler
    for p, old in zip(model.parameters(), before):
        torch.testing.assert_close(p, old, atol=3e-7, rtol=0)


def test_an_adapter_and_a_head_in_place_see_the_same_probe_as_all_in_place():
    """The head's place in a direction is behind theta's, and adapters at a virtual probe are those written in place."""
    batch, losses = lm_batch(4), []
    model = tiny_adapted(noise=0.2, modules_to_save=["lm_head"])
    opt = ZerothOrder(model, eps=0.05, queries=2, combine="mean", perturb="in-place")
    opt.estimate(lm_loss, batch)
    with torch.no_grad(), InPlace([model.base_model.theta(), *(p.data for p in opt.others.values())]) as everything:
        for seed in derive_seeds(0, 0, 2):
            for scale in (0.05, -0.05):
                everything.move_to(seed, scale)
                losses.append(lm_loss(model, batch).double().mean())
    by_hand = torch.stack([losses[0] - losses[1], losses[2] - losses[3]]) / 0.1
    torch.testing.assert_close(opt._projected[0], by_hand, atol=1e-4, rtol=0)


def test_compiled_models_see_a_perturbation_in_place():
    model, batch = torch.nn.Linear(6, 4), {"x": torch.randn(3, 6)}
    losses = []
    for wrapped in (model, torch.compile(model, backend="eager")):
        opt = ZerothOrder(wrapped, eps=0.1, queries=2, combine="mean", perturb="in-place")
        opt.estimate(lambda m, rows: m(rows["x"]).square().sum(1), batch)
        losses.append(opt._projected[0])
    assert losses[0].abs().min() > 0.01
    torch.testing.assert_close(*losses, atol=1e-4, rtol=0)


def test_a_compiled_trunk_runs_as_it_is_below_and_above_adapters():
    model, losses = tiny_adapted(layers=1, noise=0.3), []
    trunk = model.get_base_model().model

    def loss(model, batch):
        return trunk(input_ids=batch["input_ids"], use_cache=False).last_hidden_state.square().mean((1, 2))

    for _ in range(2):
        opt = ZerothOrder(model, eps=0.1, queries=2)
        with torch._dynamo.config.patch(recompile_limit=1):  # for speed
            opt.estimate(loss, lm_batch(4))
        losses.append(opt.probe_losses)
        trunk.compile(backend="eager")
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)


def test_drift_grows_with_the_width_of_a_rounding():
    """The script of docs/guide.md: float32 hardly drifts, float16 and bfloat16 do, and less in a chain."""
    drift = runpy.run_path(str(ROOT / "scripts" / "measure_drift.py"))["drift"]
    settings = {"cycles": 50, "numbers": 2000, "eps": 1e-3}
    alone = [drift(dtype, chained=False, **settings) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    chain = [drift(dtype, chained=True, **settings) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert 1e-8 < alone[0] == chain[0] < 1e-6
    assert 5e-4 < chain[1] < alone[1] < 1e-2 < chain[2] < alone[2] < 1e-1
