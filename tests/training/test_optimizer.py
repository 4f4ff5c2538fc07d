"""``estimate`` and ``step`` against the formula, accumulation, schedulers, in-place parameters, non-finite losses."""

import copy
import math
import pickle
import signal

import pytest
import torch
from tiny import lm_batch, tiny_adapted, tiny_llama

import adazeta.optimizer
from adazeta import AdaptiveQueries, ZerothOrder
from adazeta.losses import lm_loss
from adazeta.probes import take_rows
from adazeta.update import apply_step
from adazeta_kernels import derive_seeds, fill_normal_, perturb_


def direction(seed, n, distribution="gaussian"):
    return fill_normal_(torch.empty(n), seed, distribution=distribution)


def loss_at(model, theta, batch):
    """The mean loss of ``batch`` with the adapter at ``theta``."""
    own = model.base_model.theta()
    saved = own.clone()
    own.copy_(theta)
    with torch.no_grad():
        value = lm_loss(model, batch).double().mean()
    own.copy_(saved)
    return float(value)


def gradient_by_hand(model, opt, batch, queries, groups):
    """sum_j d_j z_j / N from losses at explicitly perturbed parameters."""
    theta = model.base_model.theta()
    seeds = derive_seeds(opt.run_seed, opt.step_index, queries * groups)
    rows = len(batch["labels"]) // groups
    g = torch.zeros(theta.numel(), dtype=torch.float64)
    for j, seed in enumerate(seeds):
        first = j // queries * rows
        part = take_rows(batch, torch.arange(first, first + rows))
        sides = []
        for sign in (1, -1):
            moved = theta.clone()
            perturb_([moved], [seed], [sign * opt.eps], distribution=opt.distribution)
            sides.append(loss_at(model, moved, part))
        z = direction(seed, theta.numel(), opt.distribution).double()
        g += (sides[0] - sides[1]) / (2 * opt.eps) / len(seeds) * z
    return g


@pytest.mark.parametrize("directions, groups", [("batch", 1), ("example", 4), (2, 2)])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_step_is_the_formula(directions, groups, distribution):
    model, batch = tiny_adapted(noise=0.2), lm_batch(4)
    opt = ZerothOrder(
        model,
        lr=0.5,
        eps=0.1,
        queries=3,
        directions=directions,
        combine="mean",
        distribution=distribution,
        run_seed=2**63 + 5,
    )
    theta = model.base_model.theta()
    before = theta.clone()
    expected = before - 0.5 * gradient_by_hand(model, opt, batch, 3, groups).float()
    opt.estimate(lm_loss, batch)
    assert torch.equal(theta, before)
    opt.step()
    moved = (expected - before).abs().max()
    assert moved > 1e-3
    torch.testing.assert_close(theta, expected, atol=float(moved) * 1e-3, rtol=0)
    assert opt.rows == 3 * 2 * 4 and opt.step_index == 1


def test_estimate_returns_the_mean_loss_and_descends():
    model, batch = tiny_adapted(noise=0.05), lm_batch(8)
    opt = ZerothOrder(model, lr=0.1, eps=0.02, queries=8, directions="example")
    first = loss_at(model, model.base_model.theta(), batch)
    for _ in range(30):
        loss = opt.estimate(lm_loss, batch)
        opt.step()
    last = loss_at(model, model.base_model.theta(), batch)
    assert last < first - 0.05
    assert loss == pytest.approx(last, abs=0.1)


def test_momentum_and_decay_by_hand():
    model, batch = tiny_adapted(noise=0.2, bias=True), lm_batch(4)
    opt = ZerothOrder(model, lr=0.1, eps=0.1, queries=2, combine="mean", momentum=0.5, weight_decay=0.2)
    theta = model.base_model.theta()
    biases = torch.ones(theta.numel(), dtype=torch.bool)
    for view in opt.trainable().decayed:
        first = (view.data_ptr() - theta.data_ptr()) // 4
        biases[first : first + view.numel()] = False
    layouts = [layout for _, layout in opt.sites]
    assert int(biases.sum()) == sum(s.numel for layout in layouts for s in layout.segments() if s.is_bias)
    expected, m = theta.double().clone(), torch.zeros(theta.numel(), dtype=torch.float64)
    for _ in range(3):
        m = 0.5 * m + gradient_by_hand(model, opt, batch, 2, 1)
        expected = torch.where(biases, expected, expected * (1 - 0.1 * 0.2)) - 0.1 * m
        opt.estimate(lm_loss, batch)
        opt.step()
        torch.testing.assert_close(theta.double(), expected, atol=2e-4 * float(m.abs().max()), rtol=0)
        expected = theta.double().clone()


def test_accumulation_averages_and_does_not_forget():
    """Two micro-batches give the mean of what each gives with its own directions."""
    batch = lm_batch(4)
    halves = [take_rows(batch, torch.arange(0, 2)), take_rows(batch, torch.arange(2, 4))]
    model = tiny_adapted(noise=0.2)
    opt = ZerothOrder(model, lr=1.0, eps=0.1, queries=2, combine="mean")
    theta = model.base_model.theta()
    before = theta.clone()
    seeds = derive_seeds(0, 0, 4)
    g = torch.zeros(theta.numel(), dtype=torch.float64)
    for half, pair in zip(halves, (seeds[:2], seeds[2:])):
        for seed in pair:
            sides = []
            for sign in (1, -1):
                moved = theta.clone()
                perturb_([moved], [seed], [sign * 0.1])
                sides.append(loss_at(model, moved, half))
            g += (sides[0] - sides[1]) / 0.2 / 4 * direction(seed, theta.numel()).double()
    for half in halves:
        opt.estimate(lm_loss, half)
    opt.step()
    torch.testing.assert_close(theta, before - g.float(), atol=2e-3 * float(g.abs().max()), rtol=0)


def test_torch_lr_scheduler_drives_the_step():
    model, batch = tiny_adapted(noise=0.2), lm_batch(4)
    opt = ZerothOrder(model, lr=1.0, combine="mean")
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 0.0 if k else 1.0)
    theta = model.base_model.theta()
    opt.estimate(lm_loss, batch)
    opt.step()
    scheduler.step()
    after_first = theta.clone()
    opt.estimate(lm_loss, batch)
    opt.step()
    assert torch.equal(theta, after_first)


def test_adaptive_queries_follow_the_epoch():
    model, batch = tiny_adapted(), lm_batch(4)
    opt = ZerothOrder(
        model, lr=0.0, queries=AdaptiveQueries(alpha=1, beta=1, maximum=3), steps_per_epoch=2, directions="batch"
    )
    rows = []
    for _ in range(8):
        before = opt.rows
        opt.estimate(lm_loss, batch)
        opt.step()
        rows.append((opt.rows - before) // 8)
    assert rows == [1, 1, 1, 1, 2, 2, 3, 3]


def test_non_finite_losses_are_counted_and_never_applied():
    model, batch = tiny_adapted(noise=0.2), lm_batch(4)
    opt = ZerothOrder(model, lr=0.1, queries=3, combine="spread")
    calls = iter(range(100))

    def broken(m, rows):
        losses = lm_loss(m, rows)
        next(calls)
        losses[:4] = math.nan  # the + probe of the first query
        return losses

    loss = opt.estimate(broken, batch)
    opt.step()
    assert opt.dropped == 1 and math.isfinite(loss)
    assert torch.isfinite(model.base_model.theta()).all()


def test_all_losses_non_finite_leaves_theta_alone():
    model, batch = tiny_adapted(noise=0.2), lm_batch(4)
    opt = ZerothOrder(model, lr=0.1, queries=2)
    before = model.base_model.theta().clone()
    loss = opt.estimate(lambda m, rows: torch.full((len(rows["labels"]),), math.inf), batch)
    opt.step()
    assert math.isnan(loss) and opt.dropped == 2
    assert torch.equal(model.base_model.theta(), before)


def test_state_dict_continues_bit_for_bit():
    batch = lm_batch(4)

    def run(steps, state=None, theta=None):
        model = tiny_adapted(noise=0.2)
        opt = ZerothOrder(model, lr=0.1, queries=2, momentum=0.9, weight_decay=0.1, run_seed=3)
        if state is not None:
            model.base_model.theta().copy_(theta)
            opt.load_state_dict(state)
        for _ in range(steps):
            opt.estimate(lm_loss, batch)
            opt.step()
        return opt, model.base_model.theta()

    whole, theta_whole = run(6)
    half, theta_half = run(3)
    resumed, theta_resumed = run(3, half.state_dict(), theta_half)
    assert torch.equal(theta_whole, theta_resumed) and whole.rows == resumed.rows
    with pytest.raises(ValueError, match="run_seed"):
        ZerothOrder(tiny_adapted(), run_seed=4).load_state_dict(half.state_dict())


def test_last_smaller_batch_of_an_epoch_gets_fewer_groups():
    opt = ZerothOrder(tiny_adapted(), directions=4, queries=1)
    opt.estimate(lm_loss, lm_batch(3))
    assert len(opt._projected[0]) == 3


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"eps": 0.0}, "eps"),
        ({"lr": -1.0}, "lr >= 0"),
        ({"lr": math.nan}, "finite lr >= 0"),
        ({"lr": math.inf, "momentum": 0.9}, "finite lr >= 0"),
        ({"weight_decay": math.nan}, "finite lr >= 0, weight_decay >= 0, .* got lr=0.01, weight_decay=nan"),
        ({"weight_decay": math.inf}, "finite lr >= 0, weight_decay >= 0"),
        ({"momentum": math.nan}, "momentum < 1"),
        ({"eps": math.inf}, "eps must be positive and finite, got inf"),
        ({"floor": math.nan}, "floor must not be negative, and finite, got nan"),
        ({"momentum": 1.0}, "momentum"),
        ({"directions": "token"}, "directions"),
        ({"difference": "backward"}, "difference"),
        ({"combine": "median"}, "combine"),
        ({"probes_per_forward": 0}, "probes_per_forward"),
        ({"run_seed": 2**64}, "run_seed"),
        ({"distribution": "uniform"}, "distribution"),
        ({"queries": 0}, "at least 1"),
        ({"perturb": "copy"}, "perturb"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        ZerothOrder(tiny_adapted(), **settings)


def test_step_needs_an_estimate_and_no_closure():
    opt = ZerothOrder(tiny_adapted())
    with pytest.raises(RuntimeError, match="without estimate"):
        opt.step()
    with pytest.raises(TypeError, match="no closure"):
        opt.step(lambda: 0.0)


def test_a_model_without_trainable_parameters():
    model = tiny_llama()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        ZerothOrder(model)


def test_ctrl_c_in_an_update_waits_for_the_step(monkeypatch, ctrl_c):
    """A step that has changed the parameters, but is not counted, would be made twice by who goes on."""
    models = [tiny_adapted(layers=1), tiny_adapted(layers=1)]
    steps = [ZerothOrder(model, lr=0.1, queries=2, weight_decay=0.1) for model in models]
    for step in steps:
        step.estimate(lm_loss, lm_batch(4))
    steps[0].step()

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        apply_step(*args)

    monkeypatch.setattr(adazeta.optimizer, "apply_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        steps[1].step()
    assert steps[1].step_index == 1 and steps[1].fingerprint() == steps[0].fingerprint()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_an_optimizer_is_not_copied_without_its_model(copied):
    with pytest.raises(TypeError, match="make one for a copy of the model"):
        copied(ZerothOrder(tiny_adapted(layers=1)))
