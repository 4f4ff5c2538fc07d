"""Journals of runs that train parameters which are no adapters, streamed and in place: replay, resume, going back."""

import pytest
import torch
from peft import get_peft_model_state_dict
from tiny import lm_batch, tiny_adapted, tiny_llama

from adazeta import UserError, ZerothOrder
from adazeta.errors import JournalError
from adazeta.journal import NAME
from adazeta.losses import lm_loss
from adazeta.replay import replay

SETTINGS = {"lr": 0.01, "eps": 0.02, "queries": 2, "run_seed": 5}


def start(dtype=torch.float32, **settings):
    model = tiny_llama(layers=1, tie_word_embeddings=True).to(dtype)
    return model, ZerothOrder(model, **{**SETTINGS, **settings})


def train(opt, steps, estimates=1):
    for _ in range(steps):
        for part in range(estimates):
            opt.estimate(lm_loss, lm_batch(4, seed=10 * opt.step_index + part))
        opt.step()


def saved(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_rebuilt(folder, expected):
    rebuilt = replay(folder).tensors
    assert rebuilt.keys() == expected.keys()
    assert all(torch.equal(rebuilt[name], expected[name]) for name in expected)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"difference": "forward"}])
@pytest.mark.parametrize("perturb", ["streamed", "in-place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_replay_rebuilds_all_parameters_bit_for_bit(tmp_path, dtype, perturb, settings):
    """In place too, where every estimate leaves its rounding: the replay goes to the same points."""
    model, opt = start(dtype, perturb=perturb, **settings)
    opt.write_journal(tmp_path / NAME)
    train(opt, 4)
    opt.journal.close()
    assert_rebuilt(tmp_path, saved(model))


def test_drift_is_in_the_numbers_and_in_the_replay(tmp_path):
    """Without an update what is left of a step in place is its rounding."""
    model, opt = start(torch.bfloat16, perturb="in-place", lr=0.0)
    before = saved(model)
    opt.write_journal(tmp_path / NAME)
    train(opt, 2)
    opt.journal.close()
    after = saved(model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert_rebuilt(tmp_path, after)


@pytest.mark.parametrize("perturb", ["streamed", "in-place"])
def test_replay_with_an_adapter_and_a_head(tmp_path, perturb):
    model = tiny_adapted(noise=0.2, modules_to_save=["lm_head"])
    opt = ZerothOrder(model, perturb=perturb, **SETTINGS)
    opt.write_journal(tmp_path / NAME)
    train(opt, 3)
    opt.journal.close()
    assert_rebuilt(tmp_path, get_peft_model_state_dict(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("perturb", ["streamed", "in-place"])
def test_a_run_resumed_from_its_journal_ends_with_the_same_bits(tmp_path, perturb, dtype):
    whole, opt = start(dtype, perturb=perturb)
    train(opt, 5)
    _, opt = start(dtype, perturb=perturb)
    opt.write_journal(tmp_path / NAME)
    train(opt, 3)
    opt.journal.close()
    model, opt = start(dtype, perturb=perturb)
    opt.write_journal(tmp_path / NAME, resume=True)
    train(opt, 5)
    opt.journal.close()
    assert all(map(torch.equal, model.parameters(), whole.parameters()))
    assert_rebuilt(tmp_path, saved(whole))


@pytest.mark.parametrize("perturb", ["streamed", "in-place"])
def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_bits(perturb):
    whole, opt = start(torch.bfloat16, perturb=perturb, momentum=0.5)
    train(opt, 4)
    half, opt = start(torch.bfloat16, perturb=perturb, momentum=0.5)
    train(opt, 2)
    state, weights = opt.state_dict(), half.state_dict()
    model, opt = start(torch.bfloat16, perturb=perturb, momentum=0.5)
    model.load_state_dict(weights)
    opt.load_state_dict(state)
    train(opt, 2)
    assert all(map(torch.equal, model.parameters(), whole.parameters()))


@pytest.mark.parametrize("perturb", ["streamed", "in-place"])
def test_replay_of_several_estimates_a_step(tmp_path, perturb):
    """In float32 the bits do not depend on where one estimate ends and the next begins."""
    model, opt = start(perturb=perturb)
    opt.write_journal(tmp_path / NAME)
    train(opt, 2, estimates=3)
    opt.journal.close()
    assert_rebuilt(tmp_path, saved(model))


def test_estimates_that_no_step_used_are_missed_by_the_digest(tmp_path):
    """They drift in place and are in no record: a replay says so, rather than rebuild something else."""
    for perturb in ("in-place", "streamed"):
        _, opt = start(torch.bfloat16, perturb=perturb)
        opt.write_journal(tmp_path / NAME)
        train(opt, 1)
        opt.estimate(lm_loss, lm_batch(4))
        opt.zero_grad()
        train(opt, 1)
        opt.journal.close()
        if perturb == "streamed":
            replay(tmp_path)
        else:
            with pytest.raises(JournalError, match="numbers before step 1 differ"):
                replay(tmp_path)


def test_a_run_is_not_resumed_the_other_way(tmp_path):
    _, opt = start(perturb="in-place")
    opt.write_journal(tmp_path / NAME)
    train(opt, 1)
    opt.journal.close()
    _, opt = start()
    with pytest.raises(UserError, match="another config.perturb .*in-place.*streamed"):
        opt.write_journal(tmp_path / NAME, resume=True)


@pytest.mark.parametrize("perturb", ["streamed", "in-place"])
def test_going_back_is_replayed(tmp_path, perturb):
    model, opt = start(torch.bfloat16, perturb=perturb, on_divergence="rollback")
    opt.guard.window, opt.guard.factor = 2, 10.0
    opt.write_journal(tmp_path / NAME)
    train(opt, 4)
    opt.estimate(lambda m, rows: 1e3 * lm_loss(m, rows), lm_batch(4))
    opt.step()
    assert opt.guard.went_back == 1
    train(opt, 2)
    opt.journal.close()
    assert_rebuilt(tmp_path, saved(model))
    again, opt = start(torch.bfloat16, perturb=perturb, on_divergence="rollback")
    opt.guard.window, opt.guard.factor = 2, 10.0
    opt.write_journal(tmp_path / NAME, resume=True)
    train(opt, 7)
    assert all(map(torch.equal, again.parameters(), model.parameters()))
