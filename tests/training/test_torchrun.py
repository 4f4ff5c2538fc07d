"""``adazeta train`` in many processes: the run of one, mistakes told once, clocks and Ctrl-C, torchrun's restarts."""

import os
import re
import shutil
import signal
import subprocess
import sys

import numpy
import pytest
import torch
from on_ranks import commands_on_ranks, on_ranks
from test_trainer import trainer
from tiny_run import ADAPTER, SAME_BITS, main, write_data, write_model

from adazeta import ZerothOrder, ZOConfig
from adazeta.distributed import join
from adazeta.journal import NAME, read
from adazeta.progress import Limits

DIES = """
import os, signal, sys
from adazeta import ZerothOrder, cli

def step(self, *arguments):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1" and self.step_index == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(self, *arguments)

whole, ZerothOrder.step = ZerothOrder.step, step
sys.exit(cli.main(sys.argv[1:]))
"""

ENDS = """
import atexit
import torch.distributed as dist
from adazeta.distributed import join

atexit.register(lambda: print("a group is left" if dist.is_initialized() else "no group is left"))  # runs last
join().gather_objects(1, "here")
"""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # forked from here
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a tiny base model, its data, and other data."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "base")
    write_data(folder / "data.jsonl")
    write_data(folder / "other.jsonl", 50)
    return folder


def train(folder, output, *more, data="data.jsonl", steps=5):
    paths = ("--model", folder / "base", "--data", folder / data, "--output", output)
    small = ("--steps", steps, "--lr", 0.01, "--eps", 0.01, "--eval-every", 100, "--save-every", 2)
    # One probe a forward: a loss then has the same bits wherever its probe is evaluated.
    settings = ("--batch-size", 8, "--queries", 3, "--probes-per-forward", 1)
    return [str(word) for word in ("train", *paths, *small, *settings, *SAME_BITS, *ADAPTER, *more)]


def torchrun(*words):
    """Run a script in two processes of one machine; return the process, done, with what they printed."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, *map(str, words)]
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def adapter(run):
    return (run / "adapter_model.safetensors").read_bytes()


def steps(run):
    return [(step.coefficients.tobytes(), step.loss, step.rows, step.digest) for step in read(run / NAME).steps]


def test_the_group_ends_before_python_whose_end_its_threads_would_abort(tmp_path):
    (tmp_path / "ends.py").write_text(ENDS)
    assert torchrun(tmp_path / "ends.py").stdout.count("no group is left") == 2


def test_torchrun_restarts_a_killed_rank_and_the_run_ends_as_that_of_one_process(folder, tmp_path, capsys):
    (tmp_path / "dies.py").write_text(DIES)
    done = torchrun("--max-restarts", "1", tmp_path / "dies.py", *train(folder, tmp_path / "many"))
    assert done.stdout.count("written to") == 1 and done.stderr.count("dev loss") == 2  # before and after
    assert "exitcode: -9" in done.stderr and not list(tmp_path.glob("*.partial"))
    assert main(capsys, *train(folder, tmp_path / "one"))[0] == 0
    assert adapter(tmp_path / "many") == adapter(tmp_path / "one")
    assert steps(tmp_path / "many") == steps(tmp_path / "one")


@pytest.mark.parametrize(
    "settings",
    [
        ("--queries", 2),  # fewer than ranks
        (
            "--data-ranks",
            4,
            "--batch-size",
            13,
            "--directions",
            "batch",
        ),  # 54 examples: the fifth batch has two, two ranks get none of it
    ],
)
def test_four_ranks_make_the_run_of_one(folder, tmp_path, capsys, settings):
    command = train(folder, tmp_path / "many", *settings)
    statuses, printed = commands_on_ranks(tmp_path, *[command] * 4)
    assert statuses == [0] * 4, printed
    assert "written to" in printed[0][0] and printed[1:] == [("", "")] * 3
    assert main(capsys, *train(folder, tmp_path / "one", *settings))[0] == 0
    if "--data-ranks" not in settings:
        assert steps(tmp_path / "many") == steps(tmp_path / "one")
        assert adapter(tmp_path / "many") == adapter(tmp_path / "one")
    many, one = read(tmp_path / "many" / NAME).steps, read(tmp_path / "one" / NAME).steps
    assert len(many) == len(one) == 5
    for a, b in zip(many, one):  # losses of fewer rows at once are rounded otherwise
        numpy.testing.assert_allclose(a.coefficients, b.coefficients, rtol=0, atol=1e-3)
        assert (a.rows, a.losses) == (b.rows, b.losses) and abs(a.loss - b.loss) < 1e-5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": "none.jsonl"}, "rank 1: .*none.jsonl"),
        ({"data": "other.jsonl"}, "rank 1 has another config.data_sha256 than rank 0"),
        ({"steps": 6}, "rank 1 has another config.max_steps than rank 0: 6, expected 5"),
        ({"more": ("--rows", 40)}, "rank 1 has another --rows than rank 0: 40, expected None"),
        ({"more": ("--max-minutes", 1)}, "rank 1 has another --max-minutes than rank 0: 1.0, expected None"),
        ({"more": ("--on-divergence", "ignore")}, "rank 1 has another config.on_divergence than rank 0: 'ignore'"),
    ],
)
def test_mistakes_of_one_rank_end_all_with_one_line(folder, tmp_path, changed, message):
    more = changed.pop("more", ())
    commands = [train(folder, tmp_path / "run"), train(folder, tmp_path / "run", *more, **changed)]
    statuses, printed = commands_on_ranks(tmp_path, *commands)
    assert statuses == [2, 2], printed
    lines = [line for _, err in printed for line in err.splitlines() if line.startswith("adazeta: error")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines
    assert not list(tmp_path.glob("run*"))


def test_ctrl_c_or_the_clock_of_one_rank_stops_all_after_the_same_step(folder, tmp_path, capsys, monkeypatch):
    whole = ZerothOrder.step

    def step(self, *arguments):
        if self.step_index == 1 and self.ranks.rank == 1:
            signal.raise_signal(signal.SIGINT)
        whole(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ZerothOrder, "step", step)
        statuses, printed = commands_on_ranks(tmp_path / "work", *[train(folder, tmp_path / "run")] * 2)
    assert statuses == [130, 130] and "--resume goes on" in printed[0][1] and not printed[1][1]
    assert len(read(tmp_path / "run.partial" / NAME, repair=True).steps) == 3
    # Rank 0 goes on from its checkpoint, rank 1 from the journal, as if it were on another machine.
    resumed = train(folder, tmp_path / "run", "--resume")
    late = train(folder, tmp_path / "run", "--resume", "--max-minutes", 1)
    begin = Limits.on_train_begin

    def an_hour_ago(self, *arguments, **more):
        begin(self, *arguments, **more)
        self._start -= 3600 * self.ranks.rank

    with monkeypatch.context() as patch:
        patch.setattr(Limits, "on_train_begin", an_hour_ago)
        statuses, printed = commands_on_ranks(tmp_path / "more", late, late)
    assert statuses == [0, 0], printed
    assert len(steps(tmp_path / "run")) == 4  # rank 1 wants to stop while it makes the journal's steps again
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    code, _, err = main(capsys, *resumed)
    assert code == 0 and "is complete" in err
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert main(capsys, *train(folder, tmp_path / "one"))[0] == 0
    assert steps(tmp_path / "run") == steps(tmp_path / "one")[:4]


def test_ranks_stay_together_in_a_run_resumed_with_another_schedule(folder, tmp_path, capsys, monkeypatch):
    """Rank 0 goes on from its checkpoint, rank 1 from the journal: both by the schedule of now."""

    def stop(self, args, state, control, **kwargs):
        self.interrupted = control.should_save = control.should_training_stop = state.global_step == 3

    with monkeypatch.context() as patch:
        patch.setattr(Limits, "on_step_end", stop)
        assert main(capsys, *train(folder, tmp_path / "many"))[0] == 130
    shutil.copytree(tmp_path / "many.partial", tmp_path / "one.partial")
    shutil.rmtree(tmp_path / "one.partial" / "checkpoint-3")
    more = ("--resume", "--lr-schedule", "linear", "--warmup-steps", 2)
    command = train(folder, tmp_path / "many", *more, steps=8)
    statuses, printed = commands_on_ranks(tmp_path / "work", command, command)
    assert statuses == [0, 0], printed
    assert main(capsys, *train(folder, tmp_path / "one", *more, steps=8))[0] == 0
    assert steps(tmp_path / "many") == steps(tmp_path / "one")
    assert adapter(tmp_path / "many") == adapter(tmp_path / "one")
    rates = [step.lr for step in read(tmp_path / "many" / NAME).steps]
    assert rates[3:] == [0.01 * max(0.0, (8 - k) / 6) for k in range(3, 8)]


def test_ranks_that_end_with_different_numbers_say_so(folder, tmp_path, monkeypatch):
    whole = ZerothOrder.step

    def step(self, *arguments):
        whole(self, *arguments)
        if self.step_index == 5 and self.ranks.rank == 1:
            self.trainable().tensors[0][3] += 1e-3

    monkeypatch.setattr(ZerothOrder, "step", step)
    statuses, printed = commands_on_ranks(tmp_path / "work", *[train(folder, tmp_path / "run")] * 2)
    assert statuses == [2, 2], printed
    assert "error: after step 4 theta on rank 1 differs from that on rank 0" in printed[0][1]
    assert not printed[1][1] and (tmp_path / "run.partial").is_dir() and not (tmp_path / "run").exists()


def test_the_trainer_in_two_ranks(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 3}
    zo = ZOConfig(eps=0.05, queries=3, probes_per_forward=1)

    def work(rank):
        run = trainer(tmp_path / f"run-{rank}", zo=zo, ranks=join(), **settings)
        run.train()
        losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
        torch.save((run.zeroth_order.fingerprint(), losses), tmp_path / f"rank-{rank}")
        with pytest.raises(ValueError, match="which only one of the ranks has"):
            trainer(tmp_path, ranks=join(), load_best_model_at_end=True, save_strategy="steps", **settings)

    assert on_ranks(2, tmp_path / "work", work) == ([0, 0], [])
    one = trainer(tmp_path / "one", zo=zo, **settings)
    one.train()
    losses = [entry["eval_loss"] for entry in one.state.log_history if "eval_loss" in entry]
    assert [torch.load(tmp_path / f"rank-{rank}") for rank in range(2)] == [
        (one.zeroth_order.fingerprint(), losses)
    ] * 2
    assert len(losses) == 2 and (tmp_path / "run-0" / "checkpoint-6").is_dir() and not (tmp_path / "run-1").exists()
