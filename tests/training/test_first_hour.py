"""Files as spreadsheets and scripts write them, and settings that cannot be meant: told in one line, or read right."""

import io
import json

import pytest
import torch
from tiny_run import fails, main, train_command
from transformers import get_scheduler

from adazeta.options import SCHEDULES, TRAIN, resolve, section

LABELS = ("negative", "positive")


def rows(*, count=20, **more):
    """Return JSON lines of labelled texts, some values replaced."""
    made = ({"text": f"a film no {i}", "label": LABELS[i % 2], **more} for i in range(count))
    return "".join(json.dumps(row) + "\n" for row in made)


@pytest.mark.parametrize(
    "content, told",
    [
        ("text;label\na film;positive\n", "semicolons between them, a .csv has commas: save it with those"),
        ("text\tlabel\na film\tpositive\n", "tabs between them, a .csv has commas: save it with those, or name the f"),
        ("text, label\na film, positive\n", "no column 'label', found text, ' label': is ' label' meant? name the col"),
        (
            "Text,Label\na film,positive\n",
            "no column 'text', found Text, Label: is 'Text' meant? name the columns with",
        ),
        ("review,label\na film,positive\n", "no column 'text', found review, label: name the columns with --text-col"),
    ],
)
def test_headers_that_spreadsheets_write(world, capsys, tmp_path, content, told):
    (tmp_path / "x.csv").write_text(content)
    assert told in fails(capsys, *train_command(world[0], tmp_path / "run", "--data", tmp_path / "x.csv"))


@pytest.mark.parametrize(
    "more, told",
    [
        ({"text": ["a", "film"]}, "line 1, 'text': expected text or a number, got a list, ['a', 'film']"),
        ({"text": {"en": "a film"}}, "'text': expected text or a number, got an object, {'en': 'a film'}; a dot names"),
        ({"label": {"id": 1}}, "line 1, 'label': expected text or a number, got an object, {'id': 1}"),
        ({"label": ["positive", "negative"]}, "'label': a text has one class, got several labels, ['positive', 'neg"),
        ({"text": "cut \ud83d"}, r"line 1, 'text': \ud83d at character 5 is no whole character"),
        ({"label": "\ud83d"}, r"line 1, 'label': \ud83d at character 1 is no whole character"),
    ],
    ids=["list", "object", "label object", "two labels", "half character", "half character of a label"],
)
def test_cells_that_are_no_text(world, capsys, tmp_path, more, told):
    (tmp_path / "x.jsonl").write_text(rows(**more))
    command = train_command(world[0], tmp_path / "run", "--data", tmp_path / "x.jsonl", "--task", "head")
    assert told in fails(capsys, *command, "--positions", "all")
    if "text" in more:
        assert told in fails(capsys, "predict", world[0] / "run", "--data", tmp_path / "x.jsonl")
    assert not (tmp_path / "run").exists() and not (tmp_path / "run.partial").exists()


def test_a_label_in_a_list_of_its_own_is_that_label(tmp_path):
    from adazeta.examples import read_examples

    (tmp_path / "x.jsonl").write_text(rows(label=["positive"], count=1) + rows(label=["a", "a"], count=1))
    assert [example.label for example in read_examples(tmp_path / "x.jsonl")] == ["positive", "a"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_half_a_character_in_a_column_that_is_not_asked_for(world, capsys, tmp_path, suffix):
    (tmp_path / "x.jsonl").write_text(rows(count=2, note="cut \ud83d"))
    output = tmp_path / f"answers{suffix}"
    code, _, err = main(capsys, "predict", world[0] / "run", "--data", tmp_path / "x.jsonl", "--output", output)
    assert code == 0, err
    lines = output.read_text(encoding="utf-8").splitlines()
    assert all(r"cut \ud83d" in line for line in lines[-2:])
    if suffix == ".jsonl":
        assert json.loads(lines[0])["note"] == "cut \ud83d"


def test_texts_that_are_not_utf8(world, capsys, monkeypatch):
    run = world[0] / "run"
    cut = b"caf\xe9".decode("utf-8", "surrogateescape")  # as Python reads a command line or, in the C locale, stdin
    assert "is no whole character: the text was cut in the middle of one, or is not UTF-8" in fails(
        capsys, "predict", run, cut
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffa film\n"))
    code, out, _ = main(capsys, "predict", run, "-", "--json")
    assert code == 0 and json.loads(out)["text"] == "a film"


@pytest.mark.parametrize(
    "flag, value, told",
    [
        ("--adapter-scale", "nan", "adapter: scale must be finite and not 0"),
        ("--adapter-scale", "0", "adapter: scale must be finite and not 0"),
        ("--init-gain", "inf", "adapter: init_gain must be positive and finite, got inf"),
        ("--max-minutes", "nan", "--max-minutes: expected a finite number of minutes, 0 or more, got 'nan'"),
        ("--max-minutes", "-1", "--max-minutes: expected a finite number of minutes, 0 or more, got '-1'"),
        ("--threads", 10**6, "--threads: expected at most 1024 threads, got '1000000'"),
        ("--lr-schedule", "cosine_with_min_lr", "--lr-schedule: expected one of linear, cosine, "),
    ],
)
def test_settings_that_cannot_be_meant(world, capsys, tmp_path, flag, value, told):
    assert told in fails(capsys, *train_command(world[0], tmp_path / "run", flag, value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_that_are_offered(schedule):
    train = {"lr_schedule": schedule, "lr": 0.01, "steps": 6, "warmup_steps": 2}
    keywords = section("train", resolve(train, TRAIN), "default")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=keywords["learning_rate"])
    get_scheduler(keywords["lr_scheduler_type"], optimizer, keywords["warmup_steps"], keywords["max_steps"])
