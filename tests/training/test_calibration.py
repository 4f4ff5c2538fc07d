"""Calibration: known noise, curvature and third derivative are found, and runs take and keep what follows from them."""

import json
import math
import os

import numpy as np
import pytest
import torch
from tiny import lm_batch, tiny_adapted
from tiny_run import SAME_BITS, fails, main, write_data, write_model

from adazeta import ZerothOrder
from adazeta.calibration import (
    LARGEST,
    LEVELS,
    Run,
    best_eps,
    best_lr,
    fit_noise,
    gradient_norm,
    measure,
    predict_loss,
    projection_error,
    rise_of,
)
from adazeta.errors import UserError
from adazeta.losses import lm_loss
from adazeta.prepare import as_before
from adazeta.progress import Bar
from adazeta.training import Interrupted

LADDER = LARGEST * 0.5 ** np.arange(LEVELS)
FLAT = Run(factors=[1.0] * 100, directions=[16] * 100)


@pytest.mark.parametrize("noise, third", [(1e-6, 100.0), (1e-3, 100.0), (1e-3, 1.0), (3e-8, 0.1)])
def test_noise_and_third_derivative_are_found(noise, third):
    draw = np.random.default_rng(0)
    g, t = 3 * draw.standard_normal(64), third * draw.standard_normal(64)
    odd = np.outer(LADDER, g) + np.outer(LADDER**3, t) / 6
    odd += noise / math.sqrt(2) * draw.standard_normal(odd.shape)
    found = fit_noise(LADDER, odd)
    assert found[0] == pytest.approx(noise, rel=0.2)
    assert found[1] == pytest.approx(np.sqrt(np.mean(t**2)), rel=0.3)
    eps = best_eps(*found, (LADDER[-1], LADDER[0]))
    # The true error at the eps that was found is within a tenth of the smallest there is.
    smallest = projection_error(np.geomspace(LADDER[-1], LADDER[0], 1000), noise, third).min()
    assert projection_error(eps, noise, np.sqrt(np.mean(t**2))) < 1.1 * smallest


def test_levels_without_noise_or_numbers_do_not_count():
    draw = np.random.default_rng(1)
    odd = np.outer(LADDER, draw.standard_normal(64)) + np.outer(LADDER**3, 20 * draw.standard_normal(64)) / 6
    odd += 1e-3 * draw.standard_normal(odd.shape)
    odd[-3:] = 0.0  # perturbations that are rounded away
    odd[0] = np.nan
    assert fit_noise(LADDER, odd)[0] == pytest.approx(1e-3 * math.sqrt(2), rel=0.3)
    assert fit_noise(LADDER, np.zeros_like(odd)) == (0.0, 0.0)


def test_best_eps_stays_within_limits():
    limits = (1e-4, 0.25)
    assert best_eps(1e-3, 0.0, limits) == 0.25  # no bias: as far as was looked
    assert best_eps(0.0, 1.0, limits) == 1e-4  # no noise: as near
    assert best_eps(1e-6, 3.0, limits) == pytest.approx(1e-2)


def test_gradient_norm_counts_neither_rows_nor_noise():
    draw = np.random.default_rng(2)
    mean, own, noise = draw.standard_normal(50), 3 * draw.standard_normal((50, 96)), draw.standard_normal((4000, 96))
    own -= own.mean(1, keepdims=True)
    z = draw.choice([-1.0, 1.0], (4000, 50))
    value, deviation = gradient_norm(z @ (mean[:, None] + own) + noise)
    rows = -(own**2).sum(0).mean() / 95  # rows that sum to zero are a little against each other
    assert value == pytest.approx(mean @ mean + rows, abs=4 * deviation)
    assert deviation < 0.2 * value


def test_best_lr_is_that_of_the_quadratic():
    # loss - a |grad|^2 K + a^2 s^2 tr(H) K / 2N for steps that are small beside the loss: a = |grad|^2 N / (s^2 tr(H))
    rise = rise_of(LADDER, 40 * LADDER**2 / 2)
    measured = {"loss": 1e6, "gradient2": 0.5, "spread": 2.0, "rise": rise}
    for momentum in (0.0, 0.9):
        mean = Run(FLAT.factors, FLAT.directions, momentum, "mean")
        spread = Run(FLAT.factors, FLAT.directions, momentum, "spread")
        a = 0.5 * 16 / (2.0**2 * 40) * (1 - momentum)
        assert best_lr(mean, largest=1e3, **measured)[0] == pytest.approx(a, rel=0.06)
        assert best_lr(spread, largest=1e3, **measured)[0] == pytest.approx(2 * a, rel=0.06)
    assert best_lr(mean, largest=1e-3, **measured)[0] < a / 10  # not beyond what was measured
    assert predict_loss(0.0, mean, **measured) == 1e6


class Cubic(torch.nn.Module):
    """``l_i = 1 + x_i'theta + h |theta|^2/2 + t/6 sum theta^3 + sigma sin(...)``: every term is known."""

    def __init__(self, numbers, curvature, third, noise):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(numbers))
        self.curvature, self.third, self.noise = curvature, third, noise

    def forward(self, x):
        theta, x = self.theta.double(), x.double()
        smooth = x @ theta + self.curvature * (theta**2).sum() / 2 + self.third / 6 * (theta**3).sum()
        wild = 1e7 * (x.cos() @ theta) + 10 * x.sum(1)
        return (1 + smooth + self.noise * math.sqrt(2) * wild.sin()).float()


def analytic(noise, numbers=40, **settings):
    model = Cubic(numbers, 0.5, 30.0, noise)
    generator = torch.Generator().manual_seed(0)
    mean, rows = 0.3 * torch.randn(numbers, generator=generator), torch.randn(64, numbers, generator=generator)
    batches = [{"x": (mean + 0.2 * rows)[first : first + 8]} for first in range(0, 64, 8)]
    optimizer = ZerothOrder(model, **{"directions": "example", "distribution": "rademacher", **settings})
    before = optimizer.fingerprint()
    found = measure(optimizer, lambda m, batch: m(batch["x"]), batches, FLAT, directions=64)
    assert optimizer.fingerprint() == before
    return found, float((mean + 0.2 * rows.mean(0)).norm()), (mean + 0.2 * rows)


@pytest.mark.parametrize("directions, group", [("example", 1), ("batch", 8), (2, 4)])
def test_an_analytic_function_is_measured(directions, group):
    found, norm, rows = analytic(1e-3, directions=directions)
    assert found.noise == pytest.approx(1e-3 / math.sqrt(group), rel=0.35)
    third = 30.0 * math.sqrt(40)  # t sum z^3 of 40 signs
    assert found.third == pytest.approx(third, rel=0.4)
    assert found.eps == pytest.approx((3 * 1e-3 / math.sqrt(group) / third) ** (1 / 3), rel=0.25)
    assert found.curvature == pytest.approx(0.5 * 40, rel=0.3)
    assert found.gradient == pytest.approx(norm, rel=0.25)
    groups = rows.reshape(-1, group, 40).mean(1)
    assert found.spread == pytest.approx(float(groups.norm(dim=1).square().mean().sqrt()), rel=0.25)
    assert found.resolved
    assert found.snr > 10
    assert found.predicted < found.loss
    assert analytic(1e-3, directions=directions)[0] == found  # to the bit


def test_noise_above_the_signal_is_told():
    with pytest.raises(UserError, match="rounding hides the gradient.*--dtype float32"):
        analytic(10.0)


def test_bfloat16_has_more_noise_than_float32():
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_adapted(noise=0.3, dtype=dtype, act="identity")
        optimizer = ZerothOrder(model, directions="example")
        batches = [lm_batch(rows=8, seed=seed) for seed in range(2)]
        found[dtype] = measure(optimizer, lm_loss, batches, FLAT, directions=32)
    assert found[torch.bfloat16].noise > 100 * found[torch.float32].noise
    assert found[torch.bfloat16].eps > 2 * found[torch.float32].eps
    assert found[torch.bfloat16].snr < found[torch.float32].snr


TRAIN = ("--steps", 4, "--batch-size", 4, "--queries", 4, "--rank", 2, "--bottleneck", 8, "--layers", 1)
AUTO = ("--eps", "auto", "--lr", "auto")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    write_model(folder / "base")
    write_data(folder / "data.jsonl", 14)  # 3 batches
    return folder


def files(folder):
    return ("--model", folder / "base", "--data", folder / "data.jsonl")


def test_calibrate_then_train_then_info(world, capsys):
    code, out, err = main(capsys, "calibrate", *files(world), *TRAIN, *SAME_BITS, "--output", world / "found", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found == json.loads((world / "found" / "calibration.json").read_text())
    assert (world / "found" / "calibration.png").read_bytes()[:4] == b"\x89PNG"
    assert f"--eps {found['eps']:g} --lr {found['lr']:g}" in err

    code, out, err = main(capsys, "train", *files(world), *TRAIN, *SAME_BITS, *AUTO, "--output", world / "run")
    assert code == 0, err
    card = json.loads((world / "run" / "adazeta.json").read_text())
    assert card["calibration"] == found  # measured again, to the bit
    assert (card["settings"]["eps"], card["settings"]["lr"]) == (found["eps"], found["lr"])
    code, out, _ = main(capsys, "journal", "stats", world / "run", "--json")
    assert json.loads(out)["config"]["eps"] == found["eps"]
    code, out, err = main(capsys, "info", world / "run")
    assert code == 0, err
    values = {line.split("  ")[0]: line.split()[-1] for line in out.splitlines() if "  " in line}
    assert (float(values["eps"]), float(values["lr"])) == (found["eps"], found["lr"])
    assert "noise of a loss" in out


def test_the_settings_file_of_a_run_and_data_of_the_hub(world, capsys, monkeypatch):
    """The file may say where the run goes, and by which preset; a source on the hub is looked up."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # so that the end of the test puts back what was there
    monkeypatch.delenv("HF_HUB_OFFLINE")
    seen = {}

    def load_data(settings, say):
        seen.update(settings, offline=os.environ.get("HF_HUB_OFFLINE"))
        raise UserError("seen")

    monkeypatch.setattr("adazeta.prepare.load_data", load_data)
    path = world / "run.yaml"
    path.write_text(f"output: {world / 'mine'}\npreset: paper\nmodel: {world / 'base'}\ndata: hub:some/films\n")
    films = world / "films.csv"
    films.write_text("text,label\n")
    assert "seen" in fails(capsys, "calibrate", "--config", path)
    assert (seen["act"], seen["eps"], seen["offline"]) == ("relu", "auto", None)
    assert "seen" in fails(capsys, "calibrate", "--config", path, "--preset", "default", "--data", films)
    assert (seen["act"], seen["offline"]) == ("identity", "1")


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_one_of_the_two_can_be_given(world, capsys, preset):
    given = ("--eps", 0.02, "--preset", preset, "--output", world / f"found-{preset}", "--json")
    given += ("--batches", 1, "--probed", 8)
    code, out, err = main(capsys, "calibrate", *files(world), *TRAIN, *SAME_BITS, "--positions", "all", *given)
    assert code == 0, err
    found = json.loads(out)
    assert found["eps"] == 0.02
    assert found["lr"] > 0


def test_answers_are_measured_too(world, capsys):
    given = ("--task", "completion", "--batches", 1, "--probed", 8, "--output", world / "found-answers", "--json")
    code, out, err = main(capsys, "calibrate", *files(world), *TRAIN, *SAME_BITS, *given)
    assert code == 0, err
    assert json.loads(out)["lr"] > 0


def test_a_resumed_run_keeps_its_numbers(world, capsys, monkeypatch):
    def stop(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise Interrupted

    flags = (*files(world), *TRAIN, *SAME_BITS, *AUTO, "--save-every", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Bar, "on_step_begin", stop)
        assert main(capsys, "train", *flags, "--output", world / "stopped")[0] == 130
    card = json.loads((world / "stopped.partial" / "adazeta.json").read_text())

    def measured_again(*args, **kwargs):
        raise AssertionError("a resumed run calibrated again")

    monkeypatch.setattr("adazeta.auto.calibrate", measured_again)
    resume = ("train", "--output", world / "stopped", "--resume")
    assert "belongs to a run with another run_seed (0, now 7)" in fails(capsys, *resume, "--seed", 7)
    code, _, err = main(capsys, *resume, *AUTO)
    assert code == 0, err
    resumed = json.loads((world / "stopped" / "adazeta.json").read_text())
    assert resumed["settings"] == card["settings"]
    assert resumed["calibration"] == card["calibration"]


def test_what_was_tried_when_a_run_began_stays():
    auto = {**dict.fromkeys(("dtype", "gemm", "depth", "eps", "lr"), "auto"), "dp_epsilon": None, "dp_noise": None}
    stored = {"dtype": "mixed", "gemm": "packed", "depth": 4, "eps": 0.1, "lr": 0.2}
    stored |= {"dp_epsilon": None, "dp_noise": None}
    assert as_before(auto, stored) == stored
    assert as_before({**auto, "gemm": "plain"}, stored)["gemm"] == "plain"
    assert as_before(auto, None) == auto  # nothing yet


def test_wrong_turns_are_one_line(world, capsys):
    line = fails(capsys, "calibrate", *files(world), "--batch-size", 500, *SAME_BITS)
    assert "needs a batch of 500 examples" in line
    assert "--batches" in fails(capsys, "calibrate", *files(world), "--batches", 0)
    assert "--lr: could not convert" in fails(capsys, "train", *files(world), "--lr", "automatic")
    line = fails(capsys, "calibrate", *files(world), "--objective", "accuracy")
    assert "the task's loss is what is measured, and accuracy is another one" in line
    line = fails(capsys, "calibrate", *files(world), *SAME_BITS, *TRAIN, "--lr-schedule", "reduce_lr_on_plateau")
    assert "--lr auto" in line and "give --lr a number" in line
