"""Runs that end before they are done, resumed, and the commands around the journal."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_arguments import script_evaluations
from tiny_run import fails, main, train_command, write_model

from adazeta import UserError, cli
from adazeta.journal import Journal, read, steps
from adazeta.prepare import make_deterministic
from adazeta.progress import Bar
from adazeta.run_folders import open_partial, resume_from
from adazeta.runs import read_metrics


def test_replay_is_bit_identical_and_repairs(world, capsys, tmp_path):
    folder, _ = world
    code, out, _ = main(capsys, "replay", folder / "run")
    assert (code, "equal to the saved adapter, bit for bit" in out) == (0, True)
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    path = run / "adapter_model.safetensors"
    saved = load_file(path)
    name = sorted(saved)[0]
    save_file({**saved, name: saved[name] + 1e-6}, path)
    code, out, _ = main(capsys, "replay", run)
    assert (code, f"1 of {len(saved)} tensors differ" in out) == (1, True)
    path.write_bytes(path.read_bytes()[:-5])
    assert "is missing, damaged or cut off: rebuild it with" in fails(capsys, "replay", run)
    assert "is damaged or cut off: rebuild it with" in fails(capsys, "predict", run, "a film")
    assert main(capsys, "replay", run, "--write")[0] == 0
    assert all(torch.equal(tensor, saved[key]) for key, tensor in load_file(path).items())
    assert main(capsys, "predict", run, "a film")[0] == 0


def test_ctrl_c_then_resume_is_bit_identical(world, capsys, monkeypatch):
    folder, _ = world  # an epoch has seven steps: the run stops in its second
    on_log = Bar.on_log

    def interrupt(self, args, state, control, logs=None, **kwargs):
        on_log(self, args, state, control, logs=logs, **kwargs)
        if state.global_step == 8 and "loss" in (logs or {}):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Bar, "on_log", interrupt)
    command = train_command(folder, "again")
    code, out, err = main(capsys, *command)
    assert (code, out) == (130, "")
    assert "--resume goes on from here" in err
    monkeypatch.setattr(Bar, "on_log", on_log)
    assert "holds an interrupted run: add --resume" in fails(capsys, *command)
    code, _, err = main(capsys, "train", "--output", folder / "again", "--resume")  # settings are remembered
    assert code == 0, err
    assert (folder / "again" / "adapter_model.safetensors").read_bytes() == (
        folder / "run" / "adapter_model.safetensors"
    ).read_bytes()
    first, second = (read_metrics(folder / name / "metrics.jsonl") for name in ("run", "again"))
    assert [(line["step"], line["loss"]) for line in first if line["kind"] == "train"] == [
        (line["step"], line["loss"]) for line in second if line["kind"] == "train"
    ]
    assert main(capsys, "replay", folder / "again")[0] == 0
    # The settings of a run that is complete are not read: nothing is fetched for those that stand in for them.
    monkeypatch.setattr("adazeta.prepare.model_folder", lambda *_: pytest.fail("a model is asked for"))
    assert "nothing to resume" in fails(capsys, "train", "--output", folder / "again", "--resume")


def test_a_run_killed_between_checkpoints_goes_on_from_its_journal(world, capsys, monkeypatch):
    folder, _ = world
    append = Journal.append
    computed = []

    def dying(self, step):
        append(self, step)
        if step.index == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, step):
        computed.append(step.index)
        append(self, step)

    command = train_command(folder, "killed", "--save-every", 5)
    monkeypatch.setattr(Journal, "append", dying)
    child = os.fork()
    if child == 0:  # dies between journal and update
        cli.main(command)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    monkeypatch.setattr(Journal, "append", counted)
    partial = folder / "killed.partial"
    card = (partial / "adazeta.json").read_bytes()
    assert "another config.eps (0.01, now 0.02)" in fails(
        capsys, "train", "--output", folder / "killed", "--resume", "--eps", 0.02
    )
    assert (partial / "adazeta.json").read_bytes() == card and len(list(steps(partial / "journal.azj"))) == 8
    code, _, err = main(capsys, "train", "--output", folder / "killed", "--resume")
    assert (code, computed) == (0, [8, 9, 10, 11]), err
    for name in ("journal.azj", "adapter_model.safetensors"):
        assert (folder / "killed" / name).read_bytes() == (folder / "run" / name).read_bytes()
    lines = read_metrics(folder / "killed" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 13))


def test_one_process_trains_into_a_folder(world, capsys):
    folder, _ = world
    partial = folder / "twice.partial"
    partial.mkdir()
    with open_partial(folder / "twice", resume=False, overwrite=False):
        assert "another process trains into" in fails(capsys, *train_command(folder, "twice"))
        assert partial.is_dir()
    assert not partial.exists()


def test_a_checkpoint_newer_than_the_journal_is_passed_over(world, capsys, tmp_path):
    _, said = world, []
    run = tmp_path / "x.partial"
    shutil.copytree(world[0] / "run", run)
    for step in (5, 10):
        checkpoint = run / f"checkpoint-{step}"
        checkpoint.mkdir()
        shutil.copy(run / "adapter_model.safetensors", checkpoint)
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.save({}, checkpoint / name)
        (checkpoint / "trainer_state.json").write_text('{"a": 1}')
    assert resume_from(run, said.append) == run / "checkpoint-10" and not said
    journal = run / "journal.azj"
    ends = read(journal).ends
    journal.write_bytes(journal.read_bytes()[: ends[7] + 9])
    assert resume_from(run, said.append) == run / "checkpoint-5"
    assert "checkpoint-10 is newer than the journal (7 steps)" in said[0]
    journal.write_bytes(journal.read_bytes()[: ends[3]])
    assert resume_from(run) is None


def test_replay_at_a_step_and_against_another_file(world, capsys, tmp_path):
    folder, _ = world
    run = folder / "run"
    code, out, _ = main(capsys, "replay", run, "--at", 5)
    assert (code, "5 steps replayed" in out) == (0, True)
    code, out, _ = main(capsys, "replay", run / "journal.azj", "--verify", run, "--backend", "reference")
    assert (code, "bit for bit" in out) == (0, True)
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    assert main(capsys, "replay", copy, "--at", 5, "--write")[0] == 0
    code, out, _ = main(capsys, "replay", run, "--verify", copy)
    assert (code, "tensors differ" in out) == (1, True)
    (tmp_path / "checkpoint-5").mkdir()
    shutil.copy(copy / "adapter_model.safetensors", tmp_path / "checkpoint-5")
    code, out, _ = main(capsys, "replay", run, "--verify", tmp_path / "checkpoint-5")
    assert (code, "5 steps replayed" in out, "bit for bit" in out) == (0, True, True)
    assert "holds 12 steps" in fails(capsys, "replay", run, "--at", 13)
    assert "torch knows no such device" in fails(capsys, "replay", run, "--device", "abacus")
    assert "backend" in fails(capsys, "replay", run, "--backend", "abacus")


def test_a_journal_is_an_adapter(world, capsys, tmp_path):
    folder, _ = world
    code, expected, _ = main(capsys, "predict", folder / "run", "a warm film", "--json")
    shutil.copy(folder / "run" / "journal.azj", tmp_path / "adapter.azj")
    code, out, err = main(
        capsys, "predict", folder / "base", "a warm film", "--json", "--journal", tmp_path / "adapter.azj"
    )
    assert (code, out) == (0, expected), err
    assert out != main(capsys, "predict", folder / "base", "a warm film", "--json")[1]
    other = write_model(tmp_path / "other", seed=1)
    assert "belongs to another base model" in fails(
        capsys, "predict", other, "a film", "--journal", tmp_path / "adapter.azj"
    )
    assert "cannot read the journal" in fails(capsys, "eval", folder / "base", "--journal", tmp_path / "none.azj")


def test_the_journal_of_a_packed_run_serves_plain_models(world, capsys):
    folder, _ = world
    command = train_command(folder, "packed", "--steps", 2)
    assert main(capsys, *command, "--gemm", "packed")[0] == 0
    run = folder / "packed"
    assert json.loads((run / "adazeta.json").read_text())["settings"]["gemm"] == "packed"
    code, out, err = main(capsys, "predict", folder / "base", "a film", "--json", "--journal", run / "journal.azj")
    assert (code, out) == (0, main(capsys, "predict", run, "a film", "--json")[1]), err
    partial = Path(shutil.copytree(run, folder / "packed_plain.partial"))
    resumed = [folder / "packed_plain" if part == str(run) else part for part in command]
    code, out, err = main(capsys, *resumed, "--gemm", "plain", "--resume")  # its steps are all in the journal
    assert code == 0 and not partial.exists(), err
    names = ("journal.azj", "adapter_model.safetensors")
    assert all((run / name).read_bytes() == (folder / "packed_plain" / name).read_bytes() for name in names)


def test_journal_stats_and_diff(world, capsys, tmp_path):
    folder, _ = world
    run = folder / "run"
    code, out, _ = main(capsys, "journal", "stats", run, "--json")
    found, summary = json.loads(out), json.loads((run / "summary.json").read_text())
    assert (code, found["steps"], found["rollbacks"], found["torn_bytes"]) == (0, 12, 0, 0)
    assert (found["rows"], found["losses"]) == (summary["training"]["rows"], summary["training"]["losses"])
    assert found["config"]["eps"] == 0.01 and found["bytes"] == (run / "journal.azj").stat().st_size
    assert {found["base_sha256"], found["config_sha256"]} < set(summary["digests"].values())
    assert "12, 12 in effect, 0 rollbacks" in main(capsys, "journal", "stats", run)[1]
    code, out, _ = main(capsys, "journal", "diff", run, run / "journal.azj")
    assert (code, out) == (0, "all 12 steps are equal\n")
    path = tmp_path / "short.azj"
    content = (run / "journal.azj").read_bytes()
    path.write_bytes(content[: read(run / "journal.azj").ends[4]])
    code, out, _ = main(capsys, "journal", "diff", run, path)
    assert (code, out) == (1, "12 steps | 4 steps; the first 4 are equal\n")
    assert main(capsys, *train_command(folder, "lr"), "--warmup-steps", 3)[0] == 0
    code, out, _ = main(capsys, "journal", "diff", run, folder / "lr")
    assert code == 1 and out == "step 1: lr 0.01 | lr 0.003333333333333333\nthe first 1 steps are equal\n"
    assert "expected an action" in fails(capsys, "journal")


def test_deterministic_leaves_nothing_to_the_clock(monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    values = {"max_minutes": None, "dtype": "auto", "gemm": "auto", "threads": None}
    settled = {"max_minutes": None, "dtype": "float32", "gemm": "plain", "threads": 1}
    assert make_deterministic(values) == settled
    assert make_deterministic({**values, "dtype": "mixed", "threads": 2})["dtype"] == "mixed"
    with pytest.raises(UserError, match="depends on the clock"):
        make_deterministic({**values, "max_minutes": 1.0})


def test_the_best_evaluation_is_kept_and_replays(world, capsys, monkeypatch):
    """Losses on dev are given: best after 6 steps of 12, and after 2 more evaluations it is time to stop."""
    folder, _ = world
    script_evaluations(monkeypatch, loss=[0.9, 0.8, 0.5, 0.7, 0.6, 0.1])
    command = train_command(folder, "best", "--early-stopping", 2, "--eval-every", 3, "--steps", 15)
    code, out, err = main(capsys, *command)
    assert code == 0, err
    run = folder / "best"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["training"]["steps"], summary["training"]["best_step"]) == (12, 6)
    assert summary["dev"]["after"]["loss"] == 0.5
    code, out, _ = main(capsys, "replay", run)
    assert (code, "bit for bit" in out) == (0, True)
    assert [step.back_to for step in steps(run / "journal.azj")] == [None] * 12 + [6]
    assert "expected a metric of dev, accuracy, loss" in fails(capsys, *train_command(folder, "x", "--keep-best", "f2"))
    assert not (folder / "x.partial").exists()


def test_the_best_may_be_the_base_model_and_a_resumed_run_ends_alike(world, capsys, monkeypatch):
    folder, _ = world
    script_evaluations(monkeypatch, accuracy=[0.9, 0.8, 0.9, float("nan")])

    def disk_full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as during:
        during.setattr("adazeta.training.digests", disk_full)
        command = train_command(folder, "untrained", "--keep-best", "accuracy", "--eval-every", 4)
        with pytest.raises(OSError):
            main(capsys, *command)
    journal = (folder / "untrained.partial" / "journal.azj").read_bytes()
    code, _, err = main(capsys, "train", "--output", folder / "untrained", "--resume")
    assert code == 0 and "is that of step 0" in err, err
    run = folder / "untrained"
    assert (run / "journal.azj").read_bytes() == journal
    summary = json.loads((run / "summary.json").read_text())
    assert summary["dev"]["after"] == summary["dev"]["before"] and summary["training"]["best_step"] == 0
    assert main(capsys, "replay", run)[0] == 0
