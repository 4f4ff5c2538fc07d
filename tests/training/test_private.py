"""Private steps: what an example adds is bounded, noise has its size, epsilon is right, files tell no more."""

import json
import math

import pytest
import torch
from scipy.stats import norm
from tiny import lm_batch, tiny_adapted
from tiny_run import ADAPTER, SAME_BITS, cli, fails, main, write_data, write_model
from transformers import TrainingArguments

from adazeta import ZerothOrder, ZOConfig, ZOTrainer, options, privacy
from adazeta.errors import Diverged, UserError
from adazeta.journal import NAME, read
from adazeta.losses import lm_loss
from adazeta.prepare import settle_privacy, steps_of, steps_per_epoch
from adazeta.presets import PRESETS, Preset
from adazeta.privacy import PoissonBatches, Privacy

SIZES = {"batch_size": 4, "examples": 40, "delta": 1e-3}


class Silence:
    """Randomness without any: what a step would be if nothing were added to it."""

    def gauss(self, mean, deviation):
        return mean


def test_an_example_adds_no_more_than_clip_over_all_queries(monkeypatch):
    monkeypatch.setattr(privacy, "_SECRET", Silence())
    torch.manual_seed(0)
    losses = torch.randn(1, 5, 2, 6)
    losses[0, 2, 0, 3] = math.inf  # counts as no difference
    losses[0, :, :, 4] *= 1e-3  # within the bound
    bounded = Privacy(0.5, 1.0, **SIZES)
    whole = bounded.release(losses)
    for row in range(6):
        rest = torch.cat((losses[..., :row], losses[..., row + 1 :]), -1)
        added = (whole - bounded.release(rest))[0, :, 0, 0] * bounded.batch_size
        expected = losses[0, :, 0, row].double() - losses[0, :, 1, row].double()
        expected[~torch.isfinite(expected)] = 0.0
        if expected.norm() > 0.5:
            expected *= 0.5 / expected.norm()
        torch.testing.assert_close(added, expected, atol=1e-12, rtol=1e-9)
        assert added.norm() <= 0.5 + 1e-12
    assert (whole[0, :, 1] == 0).all() and torch.isfinite(whole).all()
    assert (bounded.release(losses[..., :0]) == 0).all()  # no example


def test_noise_has_its_size_and_differs_every_time():
    settings = Privacy(0.5, 3.0, **SIZES)
    found = settings.release(torch.zeros(1, 5_000, 2, 1))[0, :, 0, 0] * settings.batch_size / (0.5 * 3.0)
    assert abs(float(found.mean())) < 0.07 and abs(float(found.std()) - 1) < 0.05  # five standard errors
    assert len(set(found.tolist())) == 5_000


def test_batches_are_poisson_samples():
    sizes = [len(batch) for _ in range(50) for batch in PoissonBatches(Privacy(1.0, 1.0, **SIZES))]
    mean = sum(sizes) / len(sizes)
    variance = sum((size - mean) ** 2 for size in sizes) / len(sizes)
    assert (
        len(sizes) == 500 and abs(mean - 4) < 0.43 and abs(variance - 3.6) < 1.2
    )  # 40 x .1 x .9, five standard errors
    assert min(sizes) == 0  # a batch in 68


def test_epsilon_is_that_of_the_accountant():
    full = {"batch_size": 40, "examples": 40, "delta": 1e-3}
    for noise, steps in ((4.0, 1), (12.0, 9)):
        spent, mu = Privacy(1.0, noise, **full).epsilon(steps), math.sqrt(steps) / noise
        # Balle and Wang 2018, theorem 8: of the Gaussian mechanism alone, in closed form.
        delta = norm.cdf(mu / 2 - spent / mu) - math.exp(spent) * norm.cdf(-mu / 2 - spent / mu)
        assert delta <= 1e-3 and delta == pytest.approx(1e-3, rel=0.05)
    sampled = Privacy.for_epsilon(2.0, steps=50, clip=1.0, **SIZES)
    assert 1.97 < sampled.epsilon(50) <= 2.0 < sampled.epsilon(51) + 0.05
    assert sampled.epsilon(50) < sampled.renyi_epsilon(50) < 1.5 * sampled.epsilon(50)
    assert sampled.epsilon(0) == 0.0 and sampled.epsilon(10) < sampled.epsilon(50)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clip": 0.0}, "clip must be positive"),
        ({"noise_multiplier": math.nan}, "noise_multiplier must be positive"),
        ({"batch_size": 41}, "batch_size <= examples, got 41 and 40"),
        ({"delta": 0.1}, r"delta must be in \(0, 1 / 40 examples\), got 0.1"),
    ],
)
def test_settings_out_of_range(changed, message):
    with pytest.raises(ValueError, match=message):
        Privacy(**{"clip": 1.0, "noise_multiplier": 1.0, **SIZES, **changed})


def test_what_would_break_the_promise_is_refused():
    model, settings = tiny_adapted(layers=1), Privacy(1.0, 1.0, **SIZES)
    for wrong, message in (
        ({"directions": "example"}, "need directions='batch'"),
        ({"difference": "forward", "queries": 2}, "central differences"),
        ({"on_divergence": "rollback"}, "rollback"),
    ):
        with pytest.raises(ValueError, match=message):
            ZerothOrder(model, privacy=settings, **wrong)
    opt = ZerothOrder(model, privacy=settings)
    opt.estimate(lm_loss, lm_batch(2))
    with pytest.raises(RuntimeError, match="one estimate"):
        opt.estimate(lm_loss, lm_batch(2))

    def of_the_batch(model, batch):
        return lm_loss(model, batch).mean().expand(len(batch["labels"]))

    with pytest.warns(RuntimeWarning, match="depends on the other rows"), pytest.raises(ValueError, match="its own"):
        ZerothOrder(model, privacy=settings).estimate(of_the_batch, lm_batch(3))


def test_with_no_clipping_and_no_noise_it_is_the_plain_step(monkeypatch):
    monkeypatch.setattr(privacy, "_SECRET", Silence())
    plain, private = tiny_adapted(layers=1, noise=0.01), tiny_adapted(layers=1, noise=0.01)
    settings = {"lr": 0.1, "queries": 3, "combine": "mean"}
    one = ZerothOrder(plain, **settings)
    other = ZerothOrder(private, privacy=Privacy(1e6, 1.0, batch_size=4, examples=40, delta=1e-3), **settings)
    for k in range(2):
        batch = lm_batch(4, seed=k)
        assert one.estimate(lm_loss, batch) == pytest.approx(other.estimate(lm_loss, batch), rel=1e-6)
        one.step()
        other.step()
    torch.testing.assert_close(private.base_model.theta(), plain.base_model.theta(), atol=1e-7, rtol=1e-5)


def test_an_empty_batch_leaves_no_trace(tmp_path):
    opt = ZerothOrder(tiny_adapted(layers=1), queries=2, privacy=Privacy(0.1, 1.0, **SIZES))
    opt.write_journal(tmp_path / NAME)
    for batch in ({}, lm_batch(3), {}):  # the first too
        opt.estimate(lm_loss, batch)
        opt.step()
    opt.journal.close()
    assert {(step.rows, step.losses) for step in read(tmp_path / NAME).steps} == {(16, 16)}


def test_a_private_run_stops_at_an_explosion(monkeypatch):
    monkeypatch.setattr(privacy, "_SECRET", Silence())
    opt = ZerothOrder(tiny_adapted(layers=1), queries=2, privacy=Privacy(1e9, 1.0, **SIZES))
    for k in range(16):
        opt.estimate(lm_loss, lm_batch(4, seed=k))
        opt.step()
    opt.estimate(lambda model, batch: 1e5 * lm_loss(model, batch), lm_batch(4))
    with pytest.raises(Diverged, match="step 16 is refused: the projected gradients' spread .* times the usual"):
        opt.step()


def test_the_trainer_draws_batches_and_its_files_tell_nothing_of_them(tmp_path):
    rows = [{name: value[k] for name, value in lm_batch(40).items()} for k in range(40)]
    trainer = ZOTrainer(
        model=tiny_adapted(layers=1),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=30,
            per_device_train_batch_size=1,  # a third of the batches is empty
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            save_steps=30,
        ),
        zo=ZOConfig(queries=2, privacy=Privacy(0.1, 1.0, batch_size=1, examples=40, delta=1e-3)),
        train_dataset=rows,
        data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
    )
    trainer.train()
    found = read(tmp_path / NAME)
    assert found.header["config"]["privacy"]["noise_multiplier"] == 1.0
    assert len(found.steps) == 30 and all(any(step.coefficients) for step in found.steps)
    assert {(step.rows, step.losses, step.dropped) for step in found.steps} == {(4, 4, 0)}
    assert all(math.isnan(step.loss) for step in found.steps)
    assert all(math.isnan(line["loss"]) and not line["tokens"] for line in trainer.state.log_history if "loss" in line)
    state = json.loads((tmp_path / "checkpoint-30" / "trainer_state.json").read_text())
    assert state["total_flos"] == trainer.state.log_history[-1]["total_flos"] == 0  # the Trainer counts them by batch
    trainer.args.per_device_train_batch_size = 2
    with pytest.raises(ValueError, match="batches of 1 of 40 examples, got batches of 2 of 40"):
        trainer.get_train_dataloader()


@pytest.mark.parametrize("epochs", [None, 0.4, 2.5])
@pytest.mark.parametrize(("batch", "accumulate"), [(16, 1), (7, 1), (5, 3), (16, 3), (60, 1)])
def test_steps_are_counted_as_the_trainer_makes_them(tmp_path, monkeypatch, epochs, batch, accumulate):
    """All 54 examples are seen in each epoch, so each may end with a smaller step."""
    train = {} if epochs is None else {"num_train_epochs": epochs}
    monkeypatch.setitem(PRESETS, "epochs", Preset(train=train))
    settings = {**options.resolve({}, options.TRAIN), "steps": None, "batch_size": batch, "accumulate": accumulate}
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, **train
    )
    trainer = ZOTrainer(tiny_adapted(layers=1), arguments, train_dataset=[{"labels": torch.ones(3)}] * 54)
    made = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())[-1]
    assert steps_of(settings, "epochs", 54) == made
    assert steps_per_epoch(settings, 54) == trainer._steps_per_epoch()


def test_epsilon_holds_where_steps_come_from_epochs(tmp_path, capsys):
    write_model(tmp_path / "base")
    write_data(tmp_path / "data.jsonl")
    where = ["--model", tmp_path / "base", "--data", tmp_path / "data.jsonl", "--output", tmp_path / "run"]
    small = ["--preset", "paper", "--batch-size", 16, "--directions", "batch", *SAME_BITS, *ADAPTER]
    code, _, err = main(capsys, "train", *where, *small, "--dp-epsilon", 3, "--dp-delta", 1e-3)
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["training"]["steps"] == 12  # 3 epochs of 54 examples: 16, 16, 16 and 6
    assert 2.99 < summary["privacy"]["epsilon"] <= 3


def test_many_processes_are_refused_before_a_model_is_loaded():
    with pytest.raises(UserError, match="drawn in one process, got 2"):
        settle_privacy({"dp_epsilon": None, "dp_noise": 1.0, "head_start": None}, "default", 40, print, processes=2)


def test_the_command_line_keeps_to_epsilon_and_resumes(tmp_path, capsys):
    write_model(tmp_path / "base")
    write_data(tmp_path / "data.jsonl")
    where = ["--model", tmp_path / "base", "--data", tmp_path / "data.jsonl", "--output", tmp_path / "run"]
    small = ["--steps", 4, "--batch-size", 4, "--queries", 2, "--directions", "batch", *SAME_BITS, *ADAPTER]
    small += ["--dp-epsilon", 4, "--dp-delta", 1e-3]
    assert "need directions='batch'" in fails(capsys, "train", *where, *small, "--directions", "example")
    assert "delta must be in" in fails(capsys, "train", *where, *small, "--dp-delta", 0.5)
    assert "a private step has one batch" in fails(capsys, "train", *where, *small, "--accumulate", 2)
    assert "depends on the other rows" in fails(capsys, "train", *where, *small, "--objective", "f1")
    assert not list(tmp_path.glob("run*"))
    code, out, err = main(capsys, "train", *where, *small)
    assert code == 0, err
    assert "epsilon 4 at delta 0.001 after 4 steps" in err and "privacy" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    spent = summary["privacy"]
    assert 3.9 < spent["epsilon"] <= 4 and spent["examples"] == 54
    assert summary["training"]["tokens"] == 0
    header = read(tmp_path / "run" / NAME).header
    assert header["config"]["data_sha256"] is None
    code, out, _ = main(capsys, "journal", "stats", tmp_path / "run", "--json")
    assert json.loads(out)["privacy"].startswith(f"epsilon {spent['epsilon']:.4g} at delta 0.001")
    assert cli.main(["replay", str(tmp_path / "run")]) == 0
    assert "give one of them" in fails(capsys, "train", *where, *small, "--dp-noise", 0.1, "--overwrite")

    (tmp_path / "run").rename(tmp_path / "run.partial")  # as if it had been killed before its last rename
    resume = ("train", "--output", tmp_path / "run", "--resume")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for more in (("--dp-epsilon", 1), ("--steps", 8), ("--steps", 8, "--dp-epsilon", 4)):
        line = fails(capsys, *resume, *more)
        assert f"steps with this run's noise, {spent['noise_multiplier']:g}, spend epsilon" in line
        assert f"expected {more[-1] if '--dp-epsilon' in more else 4} at most (--dp-epsilon)" in line
    assert "config.privacy" in fails(capsys, *resume, "--dp-noise", 2 * spent["noise_multiplier"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    code, out, err = main(capsys, *resume, "--dp-epsilon", 4)
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["privacy"] == spent
