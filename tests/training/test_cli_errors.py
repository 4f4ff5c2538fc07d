"""What goes wrong on the command line: one line that says what to do, and nothing is written."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_run import PAPER, adazeta, fails, train_command

from adazeta import UserError, cli, plots, trainer


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
    assert "cannot be loaded as a language model" in fails(capsys, "train", "--model", broken, *data)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "model.norm.weight holds NaN" in fails(capsys, "train", "--model", broken, *data)
    (broken / "config.json").write_text("{")
    assert "config.json is damaged" in fails(capsys, "train", "--model", broken, *data)
    assert not (tmp_path / "x").exists()


def test_bad_runs(world, capsys, tmp_path):
    folder, _ = world
    (tmp_path / "none").mkdir()
    assert "no such run folder" in fails(capsys, "replay", tmp_path / "nowhere")
    assert "has no journal" in fails(capsys, "replay", tmp_path / "none")
    assert "is neither a run (no adazeta.json) nor a model folder" in fails(capsys, "predict", tmp_path / "none", "a")
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
        (("--lr", "nan", "--momentum", 0.9), "settings: expected finite lr >= 0"),
        (("--steps", 0), "--steps: expected an integer of at least 1, got '0'"),
        (("--steps", "many"), "--steps: expected an integer, got 'many'"),
        (("--depth", "1.5"), "--depth: expected auto or an integer of at least 1, got '1.5'"),
        (("--queries", "adaptive:1,2"), "--queries: expected adaptive:alpha,beta,maximum"),
        (("--label-words", "good"), "--label-words: expected label=word,label=word"),
        (("--template", "none"), "the template must name columns of the data, such as {text}"),
        (("--eps", -1), "eps must be positive"),
        (("--act", "swish"), "act must be one of"),
        (("--sites", "nowhere"), "adapter:"),
        (("--dtype", "int8"), "--dtype: expected one of auto, float32"),
        (("--rank", 1000), "adapter:"),
        (("--memory-budget", "1KiB"), "memory budget of 0.0 MiB is too small for one probe"),
        (("--lr-schedule", "steep"), "steep"),
        (("--label-words", "negative=bad,positive=good"), "have several tokens"),
    ]:
        assert message in fails(capsys, *train_command(folder, "bad"), *flags)
    assert "already: add --overwrite" in fails(capsys, *train_command(folder, "run"))
    assert "not empty and not a run folder" in fails(capsys, *train_command(folder, "base"))
    for nowhere in (".", "..", "", "/"):
        for more in ((), ("--resume",)):
            told = fails(capsys, *train_command(folder, "x", "--output", nowhere, *more))
            assert "--output must name a folder that the run can take the place of" in told
    assert "is a file" in fails(capsys, *train_command(folder, "data.jsonl"))
    assert "at most 230 bytes, got one of 462" in fails(capsys, *train_command(folder, "é" * 231))
    if Path("/proc/self").exists():  # where nobody makes folders
        assert "cannot write /proc/run.partial" in fails(capsys, *train_command(folder, "x", "--output", "/proc/run"))


def test_data_that_comes_through_a_pipe(world, capsys):
    folder, _ = world
    told = fails(capsys, *train_command(folder, "x", "--data", "/dev/null"))
    assert "/dev/null is a pipe or a device, and data is read more than once: save it first" in told


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
        shutil.rmtree(folder / "run.partial")  # what can be gone on with; the folder is other tests' too


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, which is always full, on this system")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["predict", "templates"])
def test_output_onto_a_full_disk(world, command, unbuffered):
    """With text that Python keeps until it ends, and without."""
    words = [command, world[0] / "run", "a film"] if command == "predict" else [command]
    told = "adazeta: error: cannot write the output: No space left on device: make room there and run the command again"
    with open("/dev/full", "w") as full:
        done = adazeta(*words, stdout=full, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (2, [told]) and "Traceback" not in done.stderr


def test_ctrl_c_is_given_back_when_training_ends_in_an_error(world, capsys, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise UserError("this step cannot be made")

    monkeypatch.setattr(trainer.ZOTrainer, "training_step", fail)
    handler = signal.getsignal(signal.SIGINT)
    assert "this step cannot be made" in fails(capsys, *train_command(world[0], tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is handler


def test_debug_shows_where_an_error_came_from():
    from adazeta.errors import UserError

    with pytest.raises(UserError):
        cli.main(["info", "nowhere", "--debug"])


@pytest.mark.parametrize("command", ["train", "calibrate", "eval smollm2", "predict smollm2"])
def test_data_that_is_not_there_is_told_before_libraries_load(command):
    code = (
        "import sys; from adazeta.cli import main\n"
        f"assert main({[*command.split(), '--data', 'none.csv']}) == 2 and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "no such data file: none.csv; give a .csv" in done.stderr, done.stderr


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory")])
def test_a_lack_of_memory_that_smaller_forwards_do_not_meet(error, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("adazeta.memory_plan.describe_plan", fail)
    assert "out of memory" in (said := fails(capsys, "info", "smollm2", "--plan")) and "--batch-size" in said
    with pytest.raises(type(error)):
        cli.main(["info", "smollm2", "--plan", "--debug"])


LOOK = """
import sys
from adazeta import cli
status = cli.main(sys.argv[1:])
print(status, *(name for name in ("torch", "peft", "accelerate") if name in sys.modules))
"""


@pytest.mark.parametrize(
    "command, rows, told",
    [
        ("train", "words,label\na,positive\n", "no column 'text'"),
        ("train", "text,label\na,positive\nb,positive\n", "only ['positive']"),
        ("calibrate", "words,label\na,positive\n", "no column 'text'"),
        ("eval", "text,label\na,positive\nb,odd\n", "label 'odd' is not one of"),
    ],
)
def test_wrong_data_is_told_before_libraries_are_loaded(command, rows, told, world, tmp_path):
    (tmp_path / "rows.csv").write_text(rows)
    given = ["--model", world[0] / "base", "--output", tmp_path / "out"] if command != "eval" else [world[0] / "run"]
    given = [command, *given, "--data", tmp_path / "rows.csv"]
    done = subprocess.run([sys.executable, "-c", LOOK, *given], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["2"] and told in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
