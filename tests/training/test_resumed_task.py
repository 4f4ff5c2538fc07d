"""A resumed run keeps its task: another one is named before anything is written."""

import json

import pytest
from tiny_run import write_data, write_model

from adazeta import cli
from adazeta.progress import Bar
from adazeta.training import Interrupted

SMALL = ("--steps", 4, "--batch-size", 8, "--queries", 2, "--rank", 2, "--bottleneck", 8, "--layers", 1)
SETTLED = ("--positions", "all", "--threads", 1, "--dtype", "float32", "--gemm", "plain", "--save-every", 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("resumed") / "base")


def interrupted_run(base, folder, monkeypatch, *more):
    """Train two steps into ``folder / "run"`` and stop; return the flags that name the run."""

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise Interrupted

    files = ("--model", base, "--data", folder / "data.jsonl", "--output", folder / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Bar, "on_step_begin", stop)
        assert cli.main([str(a) for a in ("train", *files, *SMALL, *SETTLED, *more)]) == 130
    return ("train", "--output", folder / "run", "--resume")


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "more, named",
    [
        (("--template", "{text} is"), "task.template"),
        (("--label-words", "negative=positive,positive=negative"), "task.label_words"),
        (("--label-words", "positive=positive,negative=negative"), "config.task_sha256"),  # in another order
        (("--max-tokens", 20), "task.max_tokens (256, now 20)"),
        (("--rank", 3), "adapter.rank (2, now 3)"),  # numbers of other shapes than those of the checkpoint
    ],
)
def test_label_words(base, tmp_path, capsys, monkeypatch, more, named):
    write_data(tmp_path / "data.jsonl")
    resume = [str(argument) for argument in interrupted_run(base, tmp_path, monkeypatch)]
    before = contents(tmp_path)
    capsys.readouterr()
    assert cli.main([*resume, *map(str, more)]) == 2
    assert f"belongs to a run with another {named}" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert cli.main(resume) == 0


def test_batches_of_a_step(base, tmp_path, capsys, monkeypatch):
    """Two batches of four have twice the directions of one of eight."""
    write_data(tmp_path / "data.jsonl")
    resume = [str(argument) for argument in interrupted_run(base, tmp_path, monkeypatch)]
    before = contents(tmp_path)
    capsys.readouterr()
    assert cli.main([*resume, "--batch-size", "4", "--accumulate", "2"]) == 2
    assert "belongs to a run with another config.accumulate (None, now 2)" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert cli.main(resume) == 0


def test_normalisation_of_choices(base, tmp_path, capsys, monkeypatch):
    rows = [{"text": f"film {index}", "label": index % 2, "choices": ["no!", "yes"]} for index in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    resume = [str(argument) for argument in interrupted_run(base, tmp_path, monkeypatch, "--task", "choice")]
    assert cli.main([*resume, "--no-normalize"]) == 2
    assert "belongs to a run with another task.normalize (True, now False)" in capsys.readouterr().err


def test_depth_of_a_head(tmp_path, capsys, monkeypatch):
    """The one that differs is named, though adapters at other places have numbers that the checkpoint lacks."""
    write_data(tmp_path / "data.jsonl")
    base, head = write_model(tmp_path / "base"), ("--task", "head", "--pooling", "attention", "--depth", 2)
    resume = [str(argument) for argument in interrupted_run(base, tmp_path, monkeypatch, *head)]
    before = contents(tmp_path / "run.partial")
    assert cli.main([*resume, "--depth", "1", "--layers", "0"]) == 2
    assert "belongs to a run with another task.depth (2, now 1)" in capsys.readouterr().err
    assert contents(tmp_path / "run.partial") == before
    assert cli.main([*resume, "--depth", "auto"]) == 0  # what was settled when it began stays
