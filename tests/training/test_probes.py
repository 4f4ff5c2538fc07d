"""Batched evaluation against one probe at a time, in place, and dense matrices in float64."""

from contextlib import contextmanager

import pytest
import torch
from tiny import dense_float64, lm_batch, tiny_adapted, tiny_llama

from adazeta import ZerothOrder
from adazeta.frozen import mix
from adazeta.in_place import InPlace
from adazeta.losses import lm_loss
from adazeta.planner import MOST_TOKENS, TOKENS_PER_FORWARD, Planner
from adazeta.probes import Plan, batch_size, evaluate_probes, probes_per_forward, take_rows
from adazeta.scoring import trunk_of
from adazeta_kernels import perturb_

SIGNS = (1.0, -1.0)


def losses_of(model, plan, batch, **kwargs):
    return evaluate_probes(plan, batch, lambda rows: lm_loss(model, rows), tt_model=model.base_model, **kwargs)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("limit", [1, 3, 7, 100])
def test_batched_equals_one_by_one(groups, limit):
    model = tiny_adapted(noise=0.2)
    batch = lm_batch(4)
    seeds = list(range(10, 10 + 10 * groups))
    plan = Plan(seeds, 0.05, SIGNS, groups, 4 // groups)
    one = losses_of(model, plan, batch, planner=Planner(probes_per_forward=1))
    many = losses_of(model, plan, batch, planner=Planner(probes_per_forward=limit))
    assert one.shape == (groups, 10, 2, 4 // groups)
    assert one.std() > 1e-3  # the probes do differ
    torch.testing.assert_close(many, one, atol=1e-5, rtol=0)


def test_twenty_probes_differ_by_less_than_1e_5_from_sequential():
    model = tiny_adapted(noise=0.2)
    plan = Plan(list(range(10)), 0.05, SIGNS, 1, 4)
    a = losses_of(model, plan, lm_batch(4), planner=Planner(probes_per_forward=20))
    b = losses_of(model, plan, lm_batch(4), planner=Planner(probes_per_forward=1))
    assert (a - b).abs().max() <= 1e-5


@pytest.mark.parametrize("rows, tokens, probes", [(4, 7, 3), (1, 7, 1), (1, 2, 5), (2, 2, 1)])
def test_virtual_probes_equal_dense_float64(rows, tokens, probes):
    """1 probe, 1 example, and prompts with a single scored token: every shape equals the dense model in float64."""
    model = tiny_adapted(noise=0.2)
    batch = lm_batch(rows, tokens)
    seeds = list(range(probes))
    plan = Plan(seeds, 0.05, (1.0,), 1, rows)
    losses = losses_of(model, plan, batch)[0, :, 0]
    theta = model.base_model.theta()
    for seed, row in zip(seeds, losses):
        moved = theta.clone()
        perturb_([moved], [seed], [0.05])
        dense = dense_float64(model, moved)
        torch.testing.assert_close(row, lm_loss(dense, batch), atol=2e-6, rtol=0)


def test_virtual_equals_in_place():
    model = tiny_adapted(noise=0.2)
    batch = lm_batch(4)
    plan = Plan([5, 6, 7], 0.05, SIGNS, 1, 4)
    virtual = losses_of(model, plan, batch)
    with InPlace([model.base_model.theta()]) as others:
        in_place = evaluate_probes(plan, batch, lambda rows: lm_loss(model, rows), others=others)
    torch.testing.assert_close(virtual, in_place, atol=2e-6, rtol=0)


def test_estimating_changes_no_byte_of_theta_or_state_dict():
    model = tiny_adapted(noise=0.2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = Plan([1, 2], 0.3, SIGNS, 2, 2)
    losses_of(model, plan, lm_batch(4))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_plan_names_seed_scale_and_rows():
    plan = Plan([10, 11, 20, 21], 0.5, SIGNS, 2, 3)
    assert len(plan) == 8 and plan.rows == 24
    assert plan.probe(0) == (10, 0.5, range(0, 3))
    assert plan.probe(3) == (11, -0.5, range(0, 3))
    assert plan.probe(6) == (21, 0.5, range(3, 6))


def test_default_limit_keeps_whole_groups():
    plan = Plan(list(range(16)), 0.5, SIGNS, 8, 1)  # 4 probes per group
    assert probes_per_forward(plan, Planner(), 30, "cpu") == 8
    assert probes_per_forward(plan, Planner(), 5000, "cpu") == 1


def test_batch_helpers():
    batch = {"a": torch.arange(3), "b": torch.ones(3, 2), "name": "x"}
    assert batch_size(batch) == 3
    taken = take_rows(batch, torch.tensor([2, 0]))
    assert taken["a"].tolist() == [2, 0] and taken["name"] == "x"


@pytest.mark.parametrize(
    "batch, match",
    [
        ({}, "no tensor"),
        ({"a": torch.zeros(0, 2)}, "empty"),
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, "disagree"),
    ],
)
def test_bad_batches(batch, match):
    with pytest.raises(ValueError, match=match):
        batch_size(batch)


def test_a_loss_that_averages_is_refused():
    model = tiny_adapted()
    plan = Plan([1], 0.1, SIGNS, 1, 4)
    with pytest.raises(ValueError, match="one loss per row"):
        evaluate_probes(plan, lm_batch(4), lambda rows: lm_loss(model, rows).mean(), tt_model=model.base_model)


def test_a_step_goes_on_in_smaller_forwards_when_memory_runs_out(caplog):
    model, batch = tiny_adapted(noise=0.2), lm_batch(4)
    plan, seen = Plan([1, 2, 3, 4], 0.1, SIGNS, 1, 4), []

    def loss(rows):
        seen.append(len(rows["input_ids"]))
        if seen[-1] > 12:
            raise torch.OutOfMemoryError("tried to allocate too much")
        return lm_loss(model, rows)

    planner = Planner(probes_per_forward=8)
    results = [evaluate_probes(plan, batch, loss, tt_model=model.base_model, planner=planner) for _ in range(2)]
    assert seen == [32, 16, 8, 8, 16, 8, 8] + 4 * [8]  # halved where it failed, and from the start the next time
    expected = losses_of(model, plan, batch, planner=Planner(probes_per_forward=2))
    assert all(torch.equal(losses, expected) for losses in results)
    assert caplog.text.count("out of memory") == 1
    with pytest.raises(torch.OutOfMemoryError, match="too much"):
        evaluate_probes(plan, lm_batch(16), lambda rows: loss({"input_ids": range(13)}), planner=planner)


def test_a_large_probe_passes_in_parts(monkeypatch):
    """Of 4 rows of 7 tokens where a forward should have 14 at most: two at a time, with the same losses."""
    monkeypatch.setitem(TOKENS_PER_FORWARD, "cpu float32", 7)
    monkeypatch.setitem(MOST_TOKENS, "cpu float32", 14)
    found = {}
    for apart in (True, False):
        model, rows = tiny_adapted(noise=0.2), []
        opt = ZerothOrder(model, lr=0.05, eps=0.05, queries=2)
        opt.estimate(lm_loss, lm_batch())  # with its look at the model
        opt.zero_grad()
        opt._first_look.rows_apart = apart
        with tokens_seen(model, rows):
            found[apart] = opt.estimate(lm_loss, lm_batch()), rows
    assert (found[False][1], found[True][1]) == ([(4, 7)] * 4, [(2, 7)] * 8)
    assert found[True][0] == pytest.approx(found[False][0], abs=1e-5)


@contextmanager
def tokens_seen(model, shapes):
    def note(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))

    handle = trunk_of(model).register_forward_pre_hook(note, with_kwargs=True)
    yield
    handle.remove()


def test_rows_that_mix_are_not_parted(monkeypatch):
    monkeypatch.setitem(TOKENS_PER_FORWARD, "cpu float32", 7)
    monkeypatch.setitem(MOST_TOKENS, "cpu float32", 14)
    model, shapes = tiny_adapted(noise=0.2), []

    def mixed(model, batch):
        loss = lm_loss(model, batch)
        return loss + loss.mean()

    opt = ZerothOrder(model, lr=0.05, eps=0.05, queries=2)
    with pytest.warns(RuntimeWarning, match="depends on the other rows"):
        opt.estimate(mixed, lm_batch())
    with tokens_seen(model, shapes):
        opt.estimate(mixed, lm_batch())
    assert shapes == [(4, 7)] * 4


def test_a_part_that_does_not_fit_is_halved(monkeypatch):
    monkeypatch.setitem(TOKENS_PER_FORWARD, "cpu float32", 7)
    monkeypatch.setitem(MOST_TOKENS, "cpu float32", 14)
    model, sizes = tiny_adapted(noise=0.2), []

    def limited(batch):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 1:
            raise MemoryError
        return lm_loss(model, batch)

    plan, planner = Plan([3], 0.05, SIGNS, 1, 4), Planner(model)
    planner.rows_apart = True
    parted = evaluate_probes(plan, lm_batch(), limited, tt_model=model.base_model, planner=planner)
    assert sizes == [2, 1, 1, 2, 1, 1] + [1] * 4  # and smaller parts from the next probe on
    torch.testing.assert_close(parted, losses_of(model, plan, lm_batch()), atol=1e-5, rtol=0)


def test_a_probe_that_does_not_fit_passes_in_parts(caplog):
    model, sizes = tiny_adapted(noise=0.2), []

    def limited(batch):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 2:
            raise MemoryError
        return lm_loss(model, batch)

    plan, planner = Plan([3, 4], 0.05, SIGNS, 1, 4), Planner(probes_per_forward=2)
    with pytest.raises(MemoryError):  # as long as rows may see each other
        evaluate_probes(plan, lm_batch(), limited, tt_model=model.base_model, planner=planner)
    planner, sizes[:] = Planner(probes_per_forward=2), []
    planner.rows_apart = True
    parted = evaluate_probes(plan, lm_batch(), limited, tt_model=model.base_model, planner=planner)
    assert sizes == [8, 4] + [2] * 8  # the first one is halved twice, and all others begin with what was learned
    torch.testing.assert_close(parted, losses_of(model, plan, lm_batch()), atol=1e-5, rtol=0)
    assert caplog.text.count("out of memory") == 2  # once for each planner


def test_parts_are_equal(monkeypatch):
    monkeypatch.setitem(MOST_TOKENS, "cpu", 512)
    planner = Planner()
    assert planner.rows_at_once(16, 64) == 16
    planner.rows_apart = True
    assert [planner.rows_at_once(rows, 64) for rows in (8, 9, 16, 17, 1)] == [8, 5, 8, 6, 1]
    assert planner.rows_at_once(3, 5000) == 1


@pytest.mark.parametrize(
    ("dtype", "mixed", "kind"),
    [("float32", False, "cpu float32"), ("float32", True, "cpu mixed"), ("bfloat16", False, "cpu")],
)
def test_how_many_rows_a_cpu_takes_at_once(dtype, mixed, kind, monkeypatch):
    model = tiny_llama().to(getattr(torch, dtype)).requires_grad_(False)
    if mixed:
        mix(model)
    planner = Planner(model)
    planner.rows_apart = True
    monkeypatch.setitem(MOST_TOKENS, kind, 256)  # those of this machine may be any
    assert planner.rows_at_once(24, 64) == 4
