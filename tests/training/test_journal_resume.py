"""A resumed run: the journal is the truth about its steps, batches come in the same order, the guard remembers."""

import math

import numpy as np
import pytest
import torch
from tiny import lm_batch, tiny_adapted

from adazeta import UserError, ZerothOrder
from adazeta.errors import Diverged, JournalError
from adazeta.journal import NAME, read
from adazeta.losses import lm_loss
from adazeta.replay import effective, replay
from adazeta.update import Step

SETTINGS = {"lr": 0.1, "queries": 2, "run_seed": 2**64 - 1, "momentum": 0.9, "weight_decay": 0.1}


def optimizer(**settings):
    return ZerothOrder(tiny_adapted(), **{**SETTINGS, **settings})


def run(opt, first, last, loss_fn=lm_loss):
    losses = []
    for k in range(first, last):
        losses.append(opt.estimate(loss_fn, lm_batch(4, seed=k)))
        opt.step()
    return losses


def never(model, batch):
    raise AssertionError("a step that the journal holds needs no forward")


@pytest.mark.parametrize("checkpoint", [0, 3, 5])
def test_the_journal_is_the_truth_behind_the_checkpoint(tmp_path, checkpoint):
    whole = optimizer()
    whole.write_journal(tmp_path / "whole" / NAME)
    losses = run(whole, 0, 8)
    whole.journal.close()

    cut = optimizer()
    cut.write_journal(tmp_path / "cut" / NAME)
    run(cut, 0, checkpoint)
    state, theta = cut.state_dict(), cut.model.base_model.theta().clone()
    run(cut, checkpoint, 5)
    cut.journal.close()

    again = optimizer(probes_per_forward=1)  # another planner: the recorded steps do not depend on it
    again.model.base_model.theta().copy_(theta)
    again.load_state_dict(state)
    again.write_journal(tmp_path / "cut" / NAME, resume=True)
    assert again.pending == 5 - checkpoint
    assert run(again, checkpoint, 5, never) == losses[checkpoint:5]
    assert again.pending == 0
    run(again, 5, 8)
    again.journal.close()
    assert torch.equal(again.model.base_model.theta(), whole.model.base_model.theta())
    assert (again.rows, again.evaluations) == (whole.rows, whole.evaluations)
    assert (tmp_path / "cut" / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()


def test_a_state_keeps_what_a_schedule_set_and_gives_way_to_new_settings():
    opt = optimizer()
    opt.param_groups[0]["lr"] = 0.025  # a quarter of what it was made with
    state = opt.state_dict()
    for settings, expected in (
        ({}, (0.025, 0.9, 0.1)),
        ({"lr": 0.2}, (0.05, 0.9, 0.1)),
        ({"momentum": 0.0, "weight_decay": 0.3}, (0.025, 0.0, 0.3)),
    ):
        again = optimizer(**settings)
        again.load_state_dict(state)
        assert tuple(again.param_groups[0][name] for name in ("lr", "momentum", "weight_decay")) == expected


def test_a_checkpoint_newer_than_its_journal_and_one_of_another_run(tmp_path):
    opt = optimizer()
    opt.write_journal(tmp_path / NAME)
    run(opt, 0, 4)
    opt.journal.close()
    state, content, ends = opt.state_dict(), (tmp_path / NAME).read_bytes(), read(tmp_path / NAME).ends
    (tmp_path / NAME).write_bytes(content[: ends[2]])
    late = optimizer()
    late.load_state_dict(state)
    with pytest.raises(JournalError, match="holds 2 steps, but the checkpoint is at step 4"):
        late.write_journal(tmp_path / NAME, resume=True)
    assert late.journal is None
    other = optimizer()
    state["zeroth_order"]["step"] = 1  # the numbers are not those of step 1
    other.load_state_dict(state)
    other.write_journal(tmp_path / NAME, resume=True)
    with pytest.raises(JournalError, match="the numbers before step 1 differ"):
        run(other, 1, 2)
    other.journal.close()


def test_initial_values_that_no_seed_makes_are_taken_from_their_file(tmp_path):
    whole = ZerothOrder(tiny_adapted(noise=0.2), **SETTINGS)
    whole.write_journal(tmp_path / NAME)
    run(whole, 0, 3)
    whole.journal.close()
    again = optimizer()
    again.write_journal(tmp_path / NAME, resume=True)
    run(again, 0, 3, never)
    assert torch.equal(again.model.base_model.theta(), whole.model.base_model.theta())


def test_replay_at_every_step_and_by_the_reference(tmp_path):
    opt = optimizer()
    opt.write_journal(tmp_path / NAME)
    thetas = [opt.model.base_model.theta().clone()]
    for k in range(4):
        run(opt, k, k + 1)
        thetas.append(opt.model.base_model.theta().clone())
    opt.journal.close()
    for at, theta in enumerate(thetas):
        assert torch.equal(replay(tmp_path, at).trainable.tensors[0], theta)
    assert torch.equal(replay(tmp_path, backend="reference").trainable.tensors[0], thetas[-1])
    with pytest.raises(JournalError, match="holds 4 steps"):
        replay(tmp_path, 5)


def test_steps_that_a_later_one_went_back_behind_are_left_out():
    def step(index, back_to=None):
        return Step(index, 0.1, 0.0, 0.0, (), back_to=back_to)

    steps = [step(0), step(1), step(2), step(3, back_to=1), step(4), step(5, back_to=5), step(6, back_to=0), step(7)]
    assert [s.index for s in effective(steps[:4])] == [0]
    assert [s.index for s in effective(steps[:6])] == [0, 4]
    assert [s.index for s in effective(steps)] == [7]


class Exploding:
    """Losses that are ``factor`` times as far apart at chosen steps."""

    def __init__(self, opt, at, factor=1e4):
        self.opt, self.at, self.factor = opt, at, factor

    def __call__(self, model, batch):
        losses = lm_loss(model, batch)
        return losses * (self.factor if self.opt.step_index in self.at else 1.0)


def test_an_explosion_stops_the_run_before_it_is_recorded(tmp_path):
    opt = optimizer(weight_decay=0.0)
    opt.write_journal(tmp_path / NAME)
    loss = Exploding(opt, {20})
    run(opt, 0, 20, loss)
    theta = opt.model.base_model.theta().clone()
    with pytest.raises(Diverged, match="step 20 is refused: the projected gradients' spread .* times the usual"):
        run(opt, 20, 21, loss)
    opt.journal.close()
    assert torch.equal(opt.model.base_model.theta(), theta) and len(read(tmp_path / NAME).steps) == 20


def test_rollback_goes_to_the_best_point_and_on_with_half_the_rate_resumed_or_not(tmp_path):
    def exploding(name, resume=False):
        opt = optimizer(on_divergence="rollback")
        opt.write_journal(tmp_path / name / NAME, resume=resume)
        return opt, Exploding(opt, {20, 38})

    opt, loss = exploding("whole")
    run(opt, 0, 21, loss)
    best = opt.guard.best_step
    assert 15 <= best < 20
    assert torch.equal(opt.model.base_model.theta(), replay(tmp_path / "whole", best).trainable.tensors[0])
    run(opt, 21, 45, loss)
    opt.journal.close()
    recorded = read(tmp_path / "whole" / NAME).steps
    assert [(s.index, s.back_to) for s in recorded if s.back_to is not None][0] == (20, best)
    assert [recorded[k].lr for k in (0, 21, 39)] == [0.1, 0.05, 0.025]
    assert torch.equal(replay(tmp_path / "whole").trainable.tensors[0], opt.model.base_model.theta())

    cut, loss = exploding("cut")
    run(cut, 0, 23, loss)
    cut.journal.close()
    again, loss = exploding("cut", resume=True)
    run(again, 0, 45, loss)
    again.journal.close()
    assert (tmp_path / "cut" / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()
    assert torch.equal(again.model.base_model.theta(), opt.model.base_model.theta())


def test_losses_that_are_no_numbers_stop_a_run_after_a_while_and_only_then(tmp_path):
    def nan(model, batch):
        return lm_loss(model, batch) * math.nan

    opt = optimizer()
    run(opt, 0, 7, nan)
    run(opt, 7, 8)
    run(opt, 8, 15, nan)
    with pytest.raises(Diverged, match="no loss of 8 steps in a row is finite"):
        run(opt, 15, 16, nan)
    ignoring = optimizer(on_divergence="ignore")
    run(ignoring, 0, 10, nan)
    assert ignoring.step_index == 10


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e39, "momentum": 0.0},
        {"lr": 1e39},
        {"lr": 1e38, "combine": "spread"},  # a coefficient of 0.5, and numbers of the direction beyond 6.8
        {"lr": 1e20, "weight_decay": 1e20},
    ],
)
def test_an_update_beyond_float32_is_never_recorded(tmp_path, settings):
    opt = optimizer(**{"on_divergence": "ignore", "combine": "mean", **settings})
    opt.write_journal(tmp_path / NAME)
    with pytest.raises(Diverged, match="beyond float32"):
        run(opt, 0, 1)
    opt.journal.close()
    assert not read(tmp_path / NAME).steps


def test_the_momentum_of_earlier_steps_counts(tmp_path):
    opt = optimizer(on_divergence="ignore", weight_decay=0.0)
    opt.write_journal(tmp_path / NAME)
    run(opt, 0, 3)
    opt.param_groups[0]["lr"] = 3e38

    def flat(model, batch):
        return lm_loss(model, batch) * 0.0  # a step without a direction of its own

    with pytest.raises(Diverged, match="step 3 is refused: its update is beyond float32"):
        run(opt, 3, 4, flat)
    opt.journal.close()
    assert torch.isfinite(opt.model.base_model.theta()).all()
    again = optimizer(on_divergence="ignore", weight_decay=0.0)
    again.write_journal(tmp_path / NAME, resume=True)
    run(again, 0, 3)
    again.param_groups[0]["lr"] = 3e38
    with pytest.raises(Diverged, match="step 3 is refused: its update is beyond float32"):
        run(again, 3, 4, flat)
    again.journal.close()


@pytest.mark.parametrize(("name", "value"), [("lr", math.nan), ("lr", math.inf), ("weight_decay", math.nan)])
def test_what_a_schedule_sets_is_checked_before_it_is_recorded(tmp_path, name, value):
    opt = optimizer(on_divergence="rollback")
    opt.write_journal(tmp_path / NAME)
    run(opt, 0, 2)
    theta = opt.model.base_model.theta().clone()
    opt.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"expected finite lr >= 0, .*{name}={value}"):
        run(opt, 2, 3)
    opt.journal.close()
    assert len(read(tmp_path / NAME).steps) == 2 and torch.equal(opt.model.base_model.theta(), theta)


def test_rollback_without_a_journal_says_so():
    opt = optimizer(on_divergence="rollback")
    loss = Exploding(opt, {20})
    with pytest.raises(Diverged, match="without a journal"):
        run(opt, 0, 21, loss)
    with pytest.raises(ValueError, match="on_divergence must be one of"):
        optimizer(on_divergence="hope")


def test_a_journal_begins_at_step_0(tmp_path):
    opt = optimizer()
    run(opt, 0, 1)
    with pytest.raises(ValueError, match="begins at step 0"):
        opt.write_journal(tmp_path / NAME)
    with pytest.raises(UserError, match="cannot open the journal"):
        opt.write_journal(tmp_path / NAME, resume=True)


def test_the_last_seeds_do_not_wrap(tmp_path):
    from adazeta_kernels import derive_seed, derive_seeds, derive_seeds_of_steps

    found = derive_seeds_of_steps(2**64 - 1, [0, 2**64 - 1, 7], [3, 20, 0])
    assert [a.tolist() for a in found] == [
        derive_seeds(2**64 - 1, 0, 3),
        [derive_seed(2**64 - 1, 2**64 - 1, query) for query in range(20)],
        [],
    ]
    assert found[1].dtype == np.uint64
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="run_seed must be in"):
            optimizer(run_seed=seed)
