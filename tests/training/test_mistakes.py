"""What people get wrong is told in one line, before anything is written."""

import json
import shutil
from pathlib import Path

import pytest
from families import SETTINGS
from tiny_run import write_data, write_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from adazeta import cli, options
from adazeta.errors import UserError
from adazeta.prepare import load_data, settle
from adazeta.run_folders import open_partial


def test_a_class_of_one_example_is_noted(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(
        "text,label\n" + "".join(f"film {i},{'good' if i % 2 else 'bad'}\n" for i in range(8)) + "odd,fine\n"
    )
    told, model = [], str(write_model(tmp_path / "base"))
    settings = options.resolve({"model": model, "data": str(path), "task": "head"}, options.TRAIN)
    _, settings = load_data(settings, told.append)
    assert settings["labels"] == ["bad", "fine", "good"]
    assert told == ["note: one example only of 'fine': is that a class?"]


HEAD = ("labels", "pooling", "head_start")
CHOICE = ("choices_column", "blank", "normalize")


@pytest.mark.parametrize(
    "task, idle",
    [
        ("label-words", (*HEAD, *CHOICE, "max_new_tokens")),
        ("head", ("label_words", *CHOICE, "max_new_tokens")),
        ("choice", ("label_words", "label_names", *HEAD, "max_new_tokens")),
        ("completion", ("label_words", "label_names", *HEAD, *CHOICE)),
    ],
)
def test_settings_that_a_task_does_not_read_are_noted(world, task, idle):
    flags = {"label_words": "a=a,b=b", "label_names": "a,b", "labels": "a,b", "pooling": "mean", "normalize": "false"}
    flags |= {"head_start": "random", "choices_column": "a,b", "blank": "_", "max_new_tokens": "8", "skip_labels": "c"}
    settings = options.resolve({"model": str(world / "base"), "task": task, "positions": "all", **flags}, options.TRAIN)
    told = []
    settle(settings, told.append, given=flags)
    names = {f"--{name.replace('_', '-')}" for name in idle}
    assert set(told) == {f"{name} has no effect on task {task}" for name in names} and len(told) == len(names)
    told.clear()
    settle(settings, told.append)  # values that nobody asked for, of a template or of a run that is resumed
    assert told == []


def test_the_head_of_a_model_that_has_none(world):
    def settled(model="encoder", **given):
        told, given = [], {name: str(value) for name, value in given.items()}
        settings = options.resolve({"model": str(world / model), "positions": "all", **given}, options.TRAIN)
        settings = settle(settings, told.append, given=given)
        return settings["pooling"], settings["depth"], [line[line.index("it gets ") + 8 :] for line in told]

    own = "; --pooling own is that of transformers"
    assert settled() == ("attention", "auto", [f"--pooling attention --depth auto{own}"])
    assert settled(layers="middle")[:2] == ("attention", "auto")
    assert settled(layers="1") == ("attention", None, [f"--pooling attention{own}"])  # a block that must not go
    assert settled(depth=1) == ("attention", 1, [f"--pooling attention --depth 1{own}"])
    assert settled(dp_noise=1.0) == ("mean", None, [f"--pooling mean{own}"])  # whose examples nothing else may see
    more = ", for transformers has none for it"
    assert settled("granite", task="head") == ("attention", "auto", [f"--pooling attention --depth auto{more}"])
    assert settled("granite") == ("own", None, [])  # label words
    assert settled(pooling="own") == ("own", None, []) and settled(pooling="mean") == ("mean", None, [])
    assert settled(head="tt") == ("own", None, []) and settled("base", task="head") == ("own", None, [])


def test_settings_without_effect_from_flags_and_from_a_file(world, capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("pooling: own\nlabels:\n")  # the default, which was asked for, and nothing
    files = ("--model", world / "base", "--data", world / "data.jsonl")
    more = ("--no-normalize", "--config", tmp_path / "run.yaml", "--output", tmp_path / "run", "--text-column", "none")
    for command in ("train", "calibrate"):
        assert cli.main([str(word) for word in (command, *files, *more)]) == 2  # for want of the column, and after that
        err = capsys.readouterr().err
        assert "--pooling has no effect on task label-words\n" in err
        assert "--normalize has no effect on task label-words\n" in err and err.count("has no effect") == 2
    assert cli.main(["eval", str(world / "base"), *map(str, files[2:]), "--blank", "_", "--limit", "2"]) == 0
    assert "--blank has no effect on task label-words\n" in capsys.readouterr().err


@pytest.mark.parametrize("given", [("--dp-clip", 1, "--dp-delta", 1e-6), ("--dp-clip", 0.5), ("--dp-delta", 1e-5)])
def test_details_of_a_private_run_that_is_none(world, capsys, tmp_path, given):
    files = ("--model", world / "base", "--data", world / "data.jsonl", "--output", tmp_path / "run", "--steps", 1)
    message = f"{given[0]} alone makes no private training: add --dp-epsilon or --dp-noise, or leave {given[0]} out"
    assert message in fails(capsys, "train", *files, *given)
    (tmp_path / "run.yaml").write_text(f"{given[0][2:]}: {given[1]}\n")
    assert message in fails(capsys, "train", *files, "--config", tmp_path / "run.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a causal model ``base``, an encoder without a head ``encoder`` and labelled texts."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_model(folder / "base")
    write_data(folder / "data.jsonl")
    AutoModel.from_config(AutoConfig.for_model("bert", **SETTINGS["bert"])).save_pretrained(folder / "encoder")
    AutoModelForCausalLM.from_config(AutoConfig.for_model("granite", **SETTINGS["granite"])).save_pretrained(
        folder / "granite"
    )
    for name in ("encoder", "granite"):
        AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / name)
    return folder


def fails(capsys, *arguments):
    """Run a command that must fail in the proper way; return its one-line message."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    line = err.strip().splitlines()[-1]
    assert "Traceback" not in err and line.startswith("adazeta: error: ")
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


def test_a_run_killed_before_its_first_rename_begins_anew(tmp_path):
    partial = tmp_path / "run.partial"
    partial.mkdir()
    (partial / ".journal.azj.123.tmp").write_bytes(b"AZJ2")
    with open_partial(tmp_path / "run", resume=False, overwrite=False) as folder:
        assert folder == partial and not list(partial.iterdir())


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


@pytest.mark.parametrize(
    "config, message",
    [
        ('{"model_type": "mystery"}', "mystery"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "zero"),
        ("[]", "model_type"),
        ("{", "not a valid JSON file"),
        (
            '{"model_type": "mystery", "auto_map": {"AutoConfig": "its.Config"}}',
            "Python code of its own, which is not run",
        ),
    ],
)
def test_the_plan_of_what_is_no_model(tmp_path, capsys, config, message):
    (tmp_path / "config.json").write_text(config)
    line = fails(capsys, "info", "--plan", tmp_path)
    assert f"{tmp_path} describes no model that can be made: " in line and message in line


def test_code_in_a_model_folder_is_not_run_and_nothing_is_asked(world, tmp_path, capsys, monkeypatch):
    folder = Path(shutil.copytree(world / "base", tmp_path / "base"))
    (folder / "its.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mystery", "auto_map": {"AutoConfig": "its.C", "AutoModelForCausalLM": "its.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    line = fails(capsys, "predict", folder, "a film")
    assert "cannot be loaded as a language model: it needs Python code of its own, which is not run" in line
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_needs_a_package(world, capsys, monkeypatch):
    def missing(*_, **__):
        raise ImportError("\nThe tokenizer needs the package abacus.\nInstall it:\n")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", missing)
    line = fails(capsys, "predict", world / "base", "a film")
    assert "cannot be loaded as a language model: The tokenizer needs the package abacus. Install it:" in line
