import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import adazeta, write_data, write_model

from adazeta import UserError, cli, options, plots, trainer
from adazeta.journal import Journal, read, steps
from adazeta.progress import Bar, read_metrics
from adazeta.runs import open_partial, resume_from

SAME_BITS = ("--threads", 1, "--dtype", "float32", "--gemm", "plain")  # wherever and whenever
ADAPTER = ("--rank", 2, "--bottleneck", 8, "--sites", "mlp")
SMALL = ("--steps", 12, "--batch-size", 8, "--lr", 0.01, "--eps", 0.01, "--queries", 8, *SAME_BITS, *ADAPTER)
PAPER = ("--preset", "paper", "--queries", "adaptive:0.85,0.45,20", "--sites", "paper")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny base model ``base``, labelled texts ``data.jsonl`` and a run ``run`` made by the command.

    That command runs in another process; all of this file's commands use one thread, as GEMMs round by their number.
    """
    before = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "base")
    write_data(folder / "data.jsonl")
    done = adazeta(*train_command(folder, "run"))
    assert done.returncode == 0, done.stderr
    yield folder, done
    torch.set_num_threads(before)


def train_command(folder, output, *more):
    data = ("--model", folder / "base", "--data", folder / "data.jsonl", "--output", folder / output)
    return [str(argument) for argument in ("train", *data, *SMALL, *more)]


def main(capsys, *arguments):
    """Run the command in this process; return exit status, stdout and stderr."""
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def fails(capsys, *arguments):
    """Run a command that must fail in the proper way; return its one-line message."""
    code, out, err = main(capsys, *arguments)
    line = err.strip().splitlines()[-1]
    assert code == 2, (out, err)
    assert line.startswith("adazeta: error: ")
    assert "Traceback" not in err
    return line


# Training, and what it leaves


def test_train_leaves_a_whole_run(world):
    folder, done = world
    files = {path.name for path in (folder / "run").iterdir()}
    assert files == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "adazeta.json",
        "curves.png",
        "journal.azj",
        "metrics.jsonl",
        "summary.json",
    }
    assert not (folder / "run.partial").exists()
    assert "accuracy, 6 dev sentences" in done.stdout
    assert "12 steps, 94 forward rows, 1,504 losses" in done.stdout  # 94 examples, 8 queries of 2 probes
    assert "12/12 steps" in done.stderr
    assert re.search(r"loss \d\.\d+, queries 8, [\d.]+ rows/s", done.stderr)
    assert "Warning" not in done.stderr


def test_metrics_and_summary_agree(world):
    folder, _ = world
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    dev = [line for line in lines if line["kind"] == "dev"]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert [line["step"] for line in train] == list(range(1, 13))
    assert (dev[0]["step"], dev[-1]["step"]) == (0, 12)
    assert {"rows", "seconds", "loss", "queries", "rows_per_s"} <= train[0].keys()
    assert summary["training"]["steps"] == 12
    assert summary["training"]["rows"] == train[-1]["rows"]
    assert summary["training"]["losses"] == train[-1]["evaluations"]
    assert summary["dev"]["after"] == {name: dev[-1][name] for name in ("accuracy", "loss")}
    saved = load_file(folder / "run" / "adapter_model.safetensors")
    assert summary["adapter"]["numbers"] == sum(tensor.numel() for tensor in saved.values())
    assert sum(float(tensor.abs().sum()) for tensor in saved.values()) > 0


def test_predict_in_a_new_process(world):
    folder, _ = world
    done = adazeta("predict", folder / "run", "a warm film", "naïve – “dull”", "--json")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["text"] for line in lines] == ["a warm film", "naïve – “dull”"]
    for line in lines:
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)


def test_eval_equals_the_last_dev_line(world, capsys, tmp_path):
    folder, _ = world
    from adazeta.data import load_splits

    dev = load_splits(str(folder / "data.jsonl"), labels=("negative", "positive"))["dev"]
    path = tmp_path / "dev.jsonl"
    path.write_text("".join(json.dumps(vars(example)) + "\n" for example in dev))
    code, out, _ = main(capsys, "eval", folder / "run", "--data", path, "--json")
    result, last = json.loads(out), read_metrics(folder / "run" / "metrics.jsonl")[-1]
    assert code == 0
    assert result["examples"] == 6
    assert result["accuracy"] == pytest.approx(last["accuracy"], abs=1e-6)
    assert result["loss"] == pytest.approx(last["loss"], abs=1e-4)
    code, out, _ = main(capsys, "eval", folder / "base", "--data", path)
    assert code == 0
    assert re.fullmatch(r"accuracy [01]\.\d{4}  loss \d\.\d{4}  \(6 examples of .*\)\n", out)


def test_predict_with_the_base_model_and_other_words(world, capsys, monkeypatch):
    folder, _ = world
    words = ("--template", r"{text}\nIt was", "--label-words", "bad=terrible,good=great")
    code, out, _ = main(capsys, "predict", folder / "base", "a film", *words)
    assert code == 0
    assert re.fullmatch(r"(bad|good)  \(bad [01]\.\d{3}  good [01]\.\d{3}\)  a film\n", out)
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    code, out, _ = main(capsys, "predict", folder / "run", "-")
    assert [line.rsplit("  ", 1)[1] for line in out.splitlines()] == ["one", "two"]


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


def test_info(world, capsys):
    folder, _ = world
    code, out, _ = main(capsys, "info", folder / "run")
    assert code == 0
    for expected in ("120 numbers in 1 tensors", "1 x down_proj", "[4, 4, 4 | 2, 2, 2]", "accuracy, dev"):
        assert expected in out
    code, out, _ = main(capsys, "info", folder / "base", "--rank", 2, "--bottleneck", 8)
    assert (code, "LlamaForCausalLM" in out, "192 numbers" in out) == (0, True, True)
    code, out, _ = main(capsys, "info", 4096)
    assert (code, "1,100 numbers" in out) == (0, True)
    assert "prime" in fails(capsys, "info", 8191)


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
        (run / f"checkpoint-{step}").mkdir()
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text("{}".replace("{}", '{"a": 1}'))
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
    import torch

    from adazeta.prepare import make_deterministic

    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    values = {"max_minutes": None, "dtype": "auto", "gemm": "auto", "threads": None}
    settled = {"max_minutes": None, "dtype": "float32", "gemm": "plain", "threads": 1}
    assert make_deterministic(values) == settled
    assert make_deterministic({**values, "dtype": "mixed", "threads": 2})["dtype"] == "mixed"
    with pytest.raises(UserError, match="depends on the clock"):
        make_deterministic({**values, "max_minutes": 1.0})


def test_limits_in_rows_and_minutes(world, capsys):
    folder, _ = world
    for name, limit in (("rows", ("--rows", 40)), ("minutes", ("--max-minutes", 0))):
        code, _, err = main(capsys, *train_command(folder, name), *limit)
        assert code == 0, err
        lines = read_metrics(folder / name / "metrics.jsonl")
        train = [line for line in lines if line["kind"] == "train"]
        assert len(train) < 12
        assert lines[-1]["kind"] == "dev"  # the last step is evaluated
        assert lines[-1]["step"] == train[-1]["step"]
        if name == "rows":
            assert train[-2]["rows"] < 40 <= train[-1]["rows"]


def test_label_words_of_several_tokens_and_the_paper_preset(world, capsys):
    folder, _ = world
    words = ("--label-words", "negative=bad,positive=good", *PAPER)
    code, out, err = main(capsys, *train_command(folder, "paper"), *words)
    assert code == 0, err
    assert "12 steps, 376 forward rows" in out  # 94 examples, 2 probes, 2 label words
    code, out, _ = main(capsys, "info", folder / "paper")
    assert "768 numbers in 4 tensors" in out
    assert "2 x down_proj, 2 x o_proj" in out
    assert main(capsys, "replay", folder / "paper")[0] == 0
    assert main(capsys, "predict", folder / "paper", "a film")[0] == 0


def test_the_demo_on_a_small_scale(world, capsys, monkeypatch):
    from adazeta import data

    folder, _ = world
    examples = data.read_examples(folder / "data.jsonl")
    monkeypatch.setattr(data, "load_splits", lambda *a, **k: data.split_examples(examples, test=20, dev=6))
    defaults = {"model": str(folder / "base")}
    resolve = cli.resolve
    monkeypatch.setattr(cli, "resolve", lambda flags, *a, **k: resolve({**flags, **defaults}, *a, **k))
    code, out, err = main(capsys, "demo", *SMALL, "--output", folder / "demo")
    assert code == 0, err
    for expected in (
        "accuracy, 20 held-out sentences",
        "accuracy, 6 dev sentences",
        "peak memory above the model",
        "one estimate",
        "held-out sentence",
    ):
        assert expected in out
    summary = json.loads((folder / "demo" / "summary.json").read_text())
    assert len(summary["sentences"]) == 5
    assert summary["memory"]["allowed_bytes"] >= 16 << 20
    assert summary["memory"]["exact"] is (sys.platform == "linux")
    code, out, _ = main(capsys, "demo", *SMALL, "--output", folder / "demo")  # replaces the earlier one
    again = json.loads((folder / "demo" / "summary.json").read_text())
    assert (code, again["test"]) == (0, summary["test"])


# What goes wrong


def test_bad_models(world, capsys, tmp_path):
    folder, _ = world
    data = ("--data", folder / "data.jsonl", "--output", tmp_path / "x", *PAPER)
    assert "no such model folder: nowhere; give a folder" in fails(capsys, "train", "--model", "nowhere", *data)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in fails(capsys, "train", "--model", tmp_path / "empty", *data)
    assert "it is a run" in fails(capsys, "train", "--model", folder / "run", *data)
    assert "no such model folder" in fails(capsys, "predict", "nowhere", "a film")
    broken = Path(shutil.copytree(folder / "base", tmp_path / "broken"))
    weights = broken / "model.safetensors"
    tensors = load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be loaded as a causal language model" in fails(capsys, "train", "--model", broken, *data)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "model.norm.weight holds NaN" in fails(capsys, "train", "--model", broken, *data)
    (broken / "config.json").write_text("{")
    assert "cannot be loaded" in fails(capsys, "train", "--model", broken, *data)
    assert not (tmp_path / "x").exists()


def test_bad_runs(world, capsys, tmp_path):
    folder, _ = world
    (tmp_path / "none").mkdir()
    assert "no such run folder" in fails(capsys, "replay", tmp_path / "nowhere")
    assert "has no journal" in fails(capsys, "replay", tmp_path / "none")
    assert "is not a model folder" in fails(capsys, "predict", tmp_path / "none", "a film")
    assert "is not a run folder" in fails(capsys, "info", tmp_path / "none")
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    (run / "adapter_config.json").unlink()
    assert "is not an adapter folder" in fails(capsys, "predict", run, "a film")
    run = Path(shutil.copytree(folder / "run", tmp_path / "run2"))
    saved = load_file(run / "adapter_model.safetensors")
    saved.pop(sorted(saved)[0])
    save_file(saved, run / "adapter_model.safetensors")
    assert "does not fit the base model" in fails(capsys, "predict", run, "a film")
    (run / "adazeta.json").write_text('{"base_model": "x"}')
    assert "is damaged (no 'task')" in fails(capsys, "predict", run, "a film")
    journal = folder / "run" / "journal.azj"
    (run / "journal.azj").write_bytes(journal.read_bytes()[:-3])
    assert "cut off" in fails(capsys, "replay", run)


def test_bad_data(world, capsys, tmp_path):
    folder, _ = world
    path = tmp_path / "x.csv"
    command = train_command(folder, "bad", "--data", path)
    path.write_text("text,label\nfine,positive\nodd,neutral\n")
    assert "line 3: label 'neutral' is not one of 'negative', 'positive'" in fails(capsys, *command)
    path.write_text("text,label\n")
    assert "holds no examples" in fails(capsys, *command)
    assert "holds no examples" in fails(capsys, "eval", folder / "run", "--data", path)
    assert not (folder / "bad").exists()
    assert not (folder / "bad.partial").exists()


def test_bad_settings(world, capsys, tmp_path):
    folder, _ = world
    for flags, message in [
        (("--lr", "fast"), "--lr: could not convert"),
        (("--steps", 0), "--steps: expected an integer of at least 1, got '0'"),
        (("--queries", "adaptive:1,2"), "--queries: expected adaptive:alpha,beta,maximum"),
        (("--label-words", "good"), "--label-words: expected label=word,label=word"),
        (("--template", "none"), "the template must hold {text} exactly once"),
        (("--eps", -1), "eps must be positive"),
        (("--act", "swish"), "act must be one of"),
        (("--sites", "nowhere"), "adapter:"),
        (("--dtype", "int8"), "--dtype: expected one of auto, float32"),
        (("--rank", 1000), "adapter:"),
        (("--lr-schedule", "steep"), "steep"),
        (("--label-words", "negative=bad,positive=good"), "have several tokens"),
    ]:
        assert message in fails(capsys, *train_command(folder, "bad"), *flags)
    assert "already: add --overwrite" in fails(capsys, *train_command(folder, "run"))
    assert "not empty and not a run folder" in fails(capsys, *train_command(folder, "base"))
    assert "is a file" in fails(capsys, *train_command(folder, "data.jsonl"))


def test_a_full_disk_leaves_the_earlier_run(world, capsys, monkeypatch, tmp_path):
    folder, _ = world
    before = {path.name: path.read_bytes() for path in (folder / "run").iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for module, name in ((plots, "draw_curves"), (trainer.ZOTrainer, "save_model")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            message = fails(capsys, *train_command(folder, "run", "--overwrite"))
        assert "the disk is full: free some space" in message
        assert {path.name: path.read_bytes() for path in (folder / "run").iterdir()} == before


# Flags and files


def test_yaml_takes_the_keys_of_the_flags_and_flags_win(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "steps: 7\nlr: 1e-3\nlabel-words: {bad: terrible, good: great}\nqueries: adaptive:1,0.5,8,step\n"
        "eval_every: 5\nbias: false\nlayers: [0, 2]\n"
    )
    from_file = options.read_yaml(str(path), options.TRAIN)
    values = options.resolve({"steps": "9"}, options.TRAIN, preset="paper", from_file=from_file)
    assert (values["steps"], values["lr"], values["eval_every"]) == (9, 1e-3, 5)
    assert values["label_words"] == {"bad": " terrible", "good": " great"}
    assert options.section("zo", values, "paper")["queries"] == options.AdaptiveQueries(1, 0.5, 8, "step")
    assert options.section("zo", values, "paper")["eps"] == options.PRESETS["paper"].zo["eps"]
    tt = options.section("tt", values, "paper")
    assert (tt["bias"], tt["layers_to_transform"]) == (False, [0, 2])
    stored = {key: options.plain(value) for key, value in values.items()}
    assert options.resolve({}, options.TRAIN, stored=json.loads(json.dumps(stored))) == values


def test_a_run_from_a_file_alone(world, capsys, tmp_path):
    folder, _ = world
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {folder / 'base'}\ndata: {folder / 'data.jsonl'}\noutput: {tmp_path / 'run'}\npreset: paper\n"
        "steps: 2\nbatch-size: 4\nrank: 2\nbottleneck: 8\n"
    )
    code, out, err = main(capsys, "train", "--config", path, "--steps", 3)
    assert (code, "3 steps, 24 forward rows" in out) == (0, True), err
    assert json.loads((tmp_path / "run" / "adazeta.json").read_text())["preset"] == "paper"
    assert "already: add --overwrite" in fails(capsys, "train", "--config", path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rates: 1\n", "unknown key 'learning_rates'"),
        ("quries: 1\n", "unknown key 'quries': did you mean queries?"),
        ("steps: many\n", "key steps: "),
        ("preset: best\n", "key preset: expected one of default, paper"),
        ("- steps\n", "expected 'key: value' lines, got list"),
        ("steps: [\n", "is not YAML"),
    ],
)
def test_bad_yaml(tmp_path, content, message, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert message in fails(capsys, "train", "--config", path)
    assert "cannot read the settings file" in fails(capsys, "train", "--config", tmp_path / "none.yaml")


def test_every_option_goes_to_a_field_that_exists():
    from dataclasses import fields

    from transformers import TrainingArguments

    from adazeta import TTConfig, ZOConfig

    known = {"tt": TTConfig, "zo": ZOConfig, "train": TrainingArguments}
    for option in options.TRAIN:
        if option.goes_to:
            name, _, field = option.goes_to.partition(".")
            assert field in {entry.name for entry in fields(known[name])}, option
    for preset in options.PRESETS.values():
        for name, kind in known.items():
            assert set(getattr(preset, name)) <= {entry.name for entry in fields(kind)}


def test_every_flag_has_help_with_a_default(capsys):
    for command in ("train", "eval", "predict", "info", "replay", "journal", "demo", "fetch"):
        parser = next(iter(cli.build_parser()._subparsers._group_actions)).choices[command]
        for action in parser._actions:
            if action.option_strings and action.dest != "help":
                assert re.search(r"\(default: .+\)|\(preset .+\)", action.help), (command, action.option_strings)
            assert action.help
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
    assert main(capsys)[0] == 2


def test_help_needs_no_torch():
    root = Path(__file__).resolve().parents[2]
    code = (
        "import sys\nfrom adazeta import cli\ntry: cli.main(['train', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'python'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_debug_shows_where_an_error_came_from():
    from adazeta.errors import UserError

    with pytest.raises(UserError):
        cli.main(["info", "nowhere", "--debug"])


def test_training_keeps_what_lies_below_the_adapters(world, capsys, tmp_path, monkeypatch):
    folder, _ = world
    monkeypatch.setenv("ADAZETA_CACHE", str(tmp_path))
    command = train_command(folder, "upper", "--layers", 1, "--steps", 14, "--positions", "all", "--queries", 2)
    summaries = []
    for setting in ("disk:1MB", "disk:1MB", "off"):
        code, _, err = main(capsys, *command, "--overwrite", "--prefix-cache", setting)
        assert code == 0 and "blocks below the first adapter (1) run once per example" in err
        assert ("1 MiB of files in" in err) is (setting != "off")
        summaries.append(json.loads((folder / "upper" / "summary.json").read_text()))
    training, again, off = ([summary[key] for key in ("prefix", "training", "dev")] for summary in summaries)
    assert training[0] == {"hits": 54, "misses": 54, "bytes": training[0]["bytes"]} and training[0]["bytes"] > 10**5
    assert again[0] == {"hits": 108, "misses": 0, "bytes": training[0]["bytes"]} and again[2] == training[2]
    assert off[0] == {"hits": 0, "misses": 108, "bytes": 0}
    assert off[1]["tokens"] == training[1]["tokens"] >= training[1]["real_tokens"] == off[1]["real_tokens"]
    assert 1 <= training[1]["tokens_over_real"] <= 1.1
    lines = [line for line in read_metrics(folder / "upper" / "metrics.jsonl") if line["kind"] == "train"]
    assert lines[-1]["tokens"] == off[1]["tokens"] and lines[-1]["real_tokens"] == off[1]["real_tokens"]
    assert "prefix-cache" in fails(capsys, *command, "--overwrite", "--prefix-cache", "2GiB")
