"""Batched evaluation against one probe at a time, in place, and dense matrices in float64."""

import pytest
import torch
from tiny import dense_float64, lm_batch, tiny_adapted

from adazeta.in_place import InPlace
from adazeta.losses import causal_lm_loss
from adazeta.probes import Plan, batch_size, default_probes_per_forward, evaluate_probes, take_rows
from adazeta_kernels import perturb_

SIGNS = (1.0, -1.0)


def losses_of(model, plan, batch, **kwargs):
    return evaluate_probes(plan, batch, lambda rows: causal_lm_loss(model, rows), tt_model=model.base_model, **kwargs)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("limit", [1, 3, 7, 100])
def test_batched_equals_one_by_one(groups, limit):
    model = tiny_adapted(noise=0.2)
    batch = lm_batch(4)
    seeds = list(range(10, 10 + 10 * groups))
    plan = Plan(seeds, 0.05, SIGNS, groups, 4 // groups)
    one = losses_of(model, plan, batch, probes_per_forward=1)
    many = losses_of(model, plan, batch, probes_per_forward=limit)
    assert one.shape == (groups, 10, 2, 4 // groups)
    assert one.std() > 1e-3  # the probes do differ
    torch.testing.assert_close(many, one, atol=1e-5, rtol=0)


def test_twenty_probes_differ_by_less_than_1e_5_from_sequential():
    model = tiny_adapted(noise=0.2)
    plan = Plan(list(range(10)), 0.05, SIGNS, 1, 4)
    a = losses_of(model, plan, lm_batch(4), probes_per_forward=20)
    b = losses_of(model, plan, lm_batch(4), probes_per_forward=1)
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
        torch.testing.assert_close(row, causal_lm_loss(dense, batch), atol=2e-6, rtol=0)


def test_virtual_equals_in_place():
    model = tiny_adapted(noise=0.2)
    batch = lm_batch(4)
    plan = Plan([5, 6, 7], 0.05, SIGNS, 1, 4)
    virtual = losses_of(model, plan, batch)
    with InPlace([model.base_model.theta()]) as others:
        in_place = evaluate_probes(plan, batch, lambda rows: causal_lm_loss(model, rows), others=others)
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
    assert default_probes_per_forward(plan, {"input_ids": torch.zeros(8, 30, dtype=torch.long)}) == 8
    assert default_probes_per_forward(plan, {"input_ids": torch.zeros(8, 5000, dtype=torch.long)}) == 1


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
        evaluate_probes(plan, lm_batch(4), lambda rows: causal_lm_loss(model, rows).mean(), tt_model=model.base_model)
