"""What people get wrong is told in one line, before anything is written."""

import pytest
from families import SETTINGS
from tiny_run import write_data, write_model
from transformers import AutoConfig, AutoModel, AutoTokenizer

from adazeta import cli, options
from adazeta.errors import UserError
from adazeta.prepare import load_data
from adazeta.runs import open_partial


def test_a_class_of_one_example_is_noted(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(
        "text,label\n" + "".join(f"film {i},{'good' if i % 2 else 'bad'}\n" for i in range(8)) + "odd,fine\n"
    )
    told = []
    settings = options.resolve({"data": str(path), "task": "head"}, options.TRAIN)
    _, settings = load_data(settings, told.append)
    assert settings["labels"] == ["bad", "fine", "good"]
    assert told == ["note: one example only of 'fine': is that a class?"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a causal model ``base``, an encoder without a head ``encoder`` and labelled texts."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_model(folder / "base")
    write_data(folder / "data.jsonl")
    AutoModel.from_config(AutoConfig.for_model("bert", **SETTINGS["bert"])).save_pretrained(folder / "encoder")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "encoder")
    return folder


def fails(capsys, *arguments):
    """Run a command that must fail in the proper way; return its one-line message."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("adazeta: error: ")
    return line


def test_a_head_without_labels(world, capsys):
    assert "give --labels" in fails(capsys, "eval", world / "base", "--task", "head")
    assert "give --labels" in fails(capsys, "predict", world / "encoder", "a film", "--max-tokens", 64)


@pytest.mark.parametrize("flag", ["--batch-size", "--limit"])
def test_numbers_of_an_evaluation(world, capsys, flag):
    message = fails(capsys, "eval", world / "base", "--data", world / "data.jsonl", flag, 0)
    assert f"{flag}: expected an integer of at least 1, got '0'" in message


def test_a_file_has_no_test_split(world, capsys):
    files = ("--model", world / "base", "--data", world / "data.jsonl", "--output", world / "run")
    message = fails(capsys, "train", *files, "--test")
    assert "data.jsonl has no test split" in message and f"adazeta eval {world / 'run'} --data FILE" in message
    assert not (world / "run").exists() and not (world / "run.partial").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_partial_folder_that_is_not_ours_stays(tmp_path, overwrite):
    partial = tmp_path / "run.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="run.partial is not empty and not an unfinished run: choose another --output"):
        with open_partial(tmp_path / "run", resume=False, overwrite=overwrite):
            pass
    assert (partial / "thesis.txt").read_text() == "all of it"
    (partial / "adazeta.json").write_text("{}")  # a run that ended before its first step
    with open_partial(tmp_path / "run", resume=False, overwrite=overwrite) as folder:
        assert list(folder.iterdir()) == []
