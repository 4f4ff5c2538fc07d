"""Runs side by side, and drawn: from real runs, unfinished ones and damaged ones."""

import json
import shutil

import pytest
from tiny_run import fails, main

from adazeta.compare import comparison, describe, read_records


@pytest.fixture
def two_runs(world, tmp_path):
    """A run, and one with another learning rate that reached another accuracy and has not ended."""
    folder, _ = world
    shutil.copytree(folder / "run", tmp_path / "first")
    shutil.copytree(folder / "run", tmp_path / "second.partial")
    second = tmp_path / "second.partial"
    (second / "summary.json").unlink()
    card = json.loads((second / "adazeta.json").read_text())
    card["settings"]["lr"] = 0.5
    (second / "adazeta.json").write_text(json.dumps(card))
    with (second / "metrics.jsonl").open("a") as stream:
        line = {"kind": "dev", "step": 99, "rows": 12345, "seconds": 2.5, "loss": 0.25, "accuracy": 0.875, "score": 1.5}
        stream.write(json.dumps(line) + "\n")
    return tmp_path / "first", tmp_path / "second"


def test_what_differs_and_what_came_of_it(two_runs):
    found = comparison(read_records(two_runs))
    assert found["settings"] == ["lr"]
    first, second = found["runs"]
    assert (first["settings"], second["settings"]) == ({"lr": 0.01}, {"lr": 0.5})
    assert (first["finished"], second["finished"]) == (True, False)
    summary = json.loads((two_runs[0] / "summary.json").read_text())
    assert first["measured"]["dev"]["loss"] == [summary["dev"][when]["loss"] for when in ("before", "after")]
    assert second["measured"]["dev"]["accuracy"] == [first["measured"]["dev"]["accuracy"][0], 0.875]
    assert first["cost"]["rows"] == summary["training"]["rows"] > 0
    assert first["cost"]["numbers"] == summary["adapter"]["numbers"]
    assert (second["cost"]["rows"], second["cost"]["seconds"], second["cost"]["steps"]) == (12345, 2.5, 99)
    assert second["cost"]["losses"] is None


def test_the_table_and_the_commands(two_runs, capsys, tmp_path):
    code, out, _ = main(capsys, "compare", *two_runs)
    assert code == 0
    header, _, *rows = out.splitlines()
    assert header.split() == ["first", "second", "(not", "ended)"]
    cells = {row.split("  ")[0]: row.split("  ", 1)[1].split("  ") for row in rows}
    assert [cell.strip() for cell in cells["lr"] if cell] == ["0.01", "0.5"]
    assert "-> 87.5%" in next(row for row in rows if row.startswith("accuracy, dev"))
    assert "-> 1.500" in next(row for row in rows if row.startswith("score, dev"))  # of a function: no part of one
    assert "12,345" in next(row for row in rows if row.startswith("forward rows"))
    code, out, _ = main(capsys, "compare", *two_runs, "--json")
    assert json.loads(out) == comparison(read_records(two_runs))
    code, out, _ = main(capsys, "plot", *two_runs, "--output", tmp_path / "both")
    assert out.split() == [str(tmp_path / "both.png"), str(tmp_path / "both.html")]
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert "12,345" in (tmp_path / "both.html").read_text()
    assert main(capsys, "plot", two_runs[0], "--output", tmp_path / "one.html")[0] == 0
    assert not (tmp_path / "one.png").exists()


def test_one_run_alone_and_runs_of_one_name(two_runs, tmp_path):
    shutil.copytree(two_runs[0], tmp_path / "other" / "first")
    same = read_records([two_runs[0], tmp_path / "other" / "first"])
    assert [record.name for record in same] == [str(two_runs[0]), str(tmp_path / "other" / "first")]
    assert comparison(same)["settings"] == []
    assert "forward rows" in describe(comparison(same[:1]))


def test_the_folder_that_one_is_in(two_runs, capsys, monkeypatch):
    monkeypatch.chdir(two_runs[0])
    code, out, err = main(capsys, "compare", ".", two_runs[1])
    assert code == 0 and "first" in out and "second" in out, err
    assert main(capsys, "plot", ".", "--output", "../inside.png")[0] == 0
    for folder in (".", "..", ""):
        assert "--output must name a file, got the folder" in fails(capsys, "plot", ".", "--output", folder)
    assert "/ is not a run folder" in fails(capsys, "compare", "/")


def test_what_cannot_be_read_is_told_in_one_line(two_runs, capsys, tmp_path):
    assert "no such run folder" in fails(capsys, "compare", two_runs[0], tmp_path / "none")
    assert "--output must end in .png or .html" in fails(capsys, "plot", two_runs[0], "--output", "plot.svg")
    (two_runs[0] / "metrics.jsonl").write_text("{}\n")
    for command in ("compare", "plot"):
        assert "metrics.jsonl is damaged" in fails(capsys, command, two_runs[0])
