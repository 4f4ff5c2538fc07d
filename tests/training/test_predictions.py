"""Answers to the rows of a file: beside the columns that were read, in order, all or nothing."""

import csv
import io
import json
from types import SimpleNamespace

import pytest
from tiny_run import fails, main

from adazeta.examples import Example
from adazeta.predictions import answers, stream

ROWS = [
    {"id": "7", "text": "a warm film", "label": "?"},
    {"id": "8", "text": "dull, and\nvery long " * 9, "label": ""},
    {"id": "9", "text": "a „bright“ one", "label": "positive"},
]


@pytest.fixture
def rows(tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    return tmp_path / "rows.csv"


def test_a_file_is_answered_beside_its_columns(world, capsys, rows, tmp_path):
    run = world[0] / "run"
    code, out, _ = main(capsys, "predict", run, *(row["text"] for row in ROWS), "--json")
    expected = [json.loads(line) for line in out.splitlines()]
    code, out, err = main(capsys, "predict", run, "--data", rows, "--output", tmp_path / "out.csv", "--batch-size", 2)
    assert (code, out) == (0, ""), err
    assert "3 rows written" in err and "3/3 rows" in err
    with (tmp_path / "out.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [{key: row[key] for key in ROWS[0]} for row in found] == ROWS
    assert list(found[0]) == ["id", "text", "label", "prediction", "p(negative)", "p(positive)"]
    for row, one in zip(found, expected):
        assert row["prediction"] == one["label"]
        for label, p in one["probabilities"].items():
            assert float(row[f"p({label})"]) == pytest.approx(p, abs=2e-6)
    assert main(capsys, "predict", run, "--data", tmp_path / "out.csv", "--output", tmp_path / "again.jsonl")[0] == 2
    assert main(capsys, "predict", run, "--data", rows, "--output", tmp_path / "out.jsonl")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{key: line[key] for key in ROWS[0]} for line in lines] == ROWS
    assert [line["prediction"] for line in lines] == [one["label"] for one in expected]
    assert lines[0]["probabilities"] == pytest.approx(expected[0]["probabilities"], abs=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.jsonl", "rows.csv"]


def test_wrong_turns_leave_earlier_answers(world, capsys, rows, tmp_path):
    command = ("predict", world[0] / "run", "--data", rows, "--output", tmp_path / "out.csv")
    (tmp_path / "out.csv").write_text("earlier")
    assert "add --overwrite" in fails(capsys, *command)
    rows.write_text(rows.read_text() + '10," ",x\n')
    assert "line 14: the text is empty" in fails(capsys, *command, "--overwrite")
    rows.write_text("text,prediction\na film,x\n")
    assert "has a column 'prediction' already" in fails(capsys, *command, "--overwrite")
    rows.write_text("text,x\na film,1,2\n")
    assert "line 2: more cells than" in fails(capsys, *command, "--overwrite")
    assert "line 2: more cells than" in fails(capsys, *command[:4])
    rows.write_text("words\na film\n")
    assert "no column 'text', found words" in fails(capsys, *command, "--overwrite")
    assert (tmp_path / "out.csv").read_text() == "earlier"
    assert "--output must end in .csv" in fails(capsys, *command[:-1], tmp_path / "out.xlsx")
    assert "name a file with --data" in fails(capsys, *command[:2], "a film", "--output", tmp_path / "x.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "rows.csv"]


def test_lines_of_a_pipe_are_answered_as_they_come(world, capsys, monkeypatch):
    run, said = world[0] / "run", []

    class Pipe(io.StringIO):
        def __next__(self):
            said.append(capsys.readouterr().out.count("\n"))
            return super().__next__()

    monkeypatch.setattr("sys.stdin", Pipe("a warm film\n\na dull one\nanother\n"))
    assert main(capsys, "predict", run, "-", "--batch-size", 1)[0] == 0
    assert said == [0, 1, 0, 1, 1]  # answers between one line and the next; an empty line has none
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert "no text to label" in fails(capsys, "predict", run, "-")


class Model:
    """Stands for a classifier whose answers show what it was asked."""

    def __init__(self, kind, labels=None):
        def generate(model, tokenizer, texts, *, max_new_tokens, batch_size, say):
            say(f"{batch_size} at once")
            self.asked.append(list(texts))
            return [text.upper()[:max_new_tokens] for text in texts]

        self.asked, self.model, self.tokenizer = [], None, None
        self.task = SimpleNamespace(kind=kind, labels=labels, generate=generate)

    def probabilities(self, examples, batch_size, say):
        say(f"note {len(self.asked)}")
        self.asked.append([example.text for example in examples])
        return [[0.25, 0.75, 0.0][: max(2, len(example.choices))] for example in examples]


def test_answers_of_every_kind_of_task():
    (said,) = answers(Model("completion"), [Example("why", "")])
    assert (said.prediction, said.probabilities) == ("WHY", None)
    notes = []
    (said,) = answers(Model("completion"), [Example("why", "")], batch_size=3, max_new_tokens=2, say=notes.append)
    assert (said.prediction, notes) == ("WH", ["3 at once"])
    (chosen,) = answers(Model("choice"), [Example("which", "", ("a", "b", "c"))])
    assert (chosen.prediction, chosen.probabilities) == ("b", {"a": 0.25, "b": 0.75, "c": 0.0})


def test_a_stream_holds_a_few_batches_at_a_time():
    model = Model("head", ("no", "yes"))
    texts = [str(number) for number in range(20)]
    notes = []
    found = list(stream(model, ((Example(text, ""), text) for text in texts), batch_size=2, say=notes.append))
    assert [(example.text, row) for example, row, _ in found] == list(zip(texts, texts))
    assert [len(asked) for asked in model.asked] == [16, 4]
    assert notes == ["note 0"]


def test_rows_that_cannot_be_asked_are_told_before_the_model_is_opened(world, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("adazeta.commands.predict.opened", lambda *_: pytest.fail("the model is opened"))
    run, rows = world[0] / "run", tmp_path / "rows.csv"
    rows.write_text("review\na film\n")
    for more in ((), ("--output", tmp_path / "out.csv")):
        assert "no column 'text'" in fails(capsys, "predict", run, "--data", rows, *more)
    rows.write_text("text\n")
    assert "rows.csv holds no rows" in fails(capsys, "predict", run, "--data", rows)
    columns = ("--template", "{premise} {hypothesis}", "--columns", "premise=premise,hypothesis=hypothesis")
    message = fails(capsys, "predict", run, "a film", *columns)
    assert "'a film': this run has several columns" in message
