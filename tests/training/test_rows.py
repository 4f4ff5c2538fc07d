"""Rows of Parquet files, of folders that ``datasets`` saved and of the hub; a few examples of each class."""

import builtins
import json
from collections import Counter

import pytest
from tiny_run import fails, train_command

from adazeta.data import load_splits, take_shots
from adazeta.errors import UserError
from adazeta.examples import Example, Fields, read_examples
from adazeta.rows import read_rows

datasets = pytest.importorskip("datasets", reason="the package datasets is not installed (the extra 'data')")

ROWS = {"text": ["warm", "dull", "bright"], "label": [1, 0, -1]}
NAMED = [Example("warm", "good"), Example("dull", "bad"), Example("bright", "-1")]


def dataset(**columns):
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    return datasets.Dataset.from_dict(columns or ROWS, features=datasets.Features(features))


def test_a_parquet_file(tmp_path):
    path = tmp_path / "x.parquet"
    nested = {"text": ["a", "b"], "answers": [{"text": ["x", "y"]}, {"text": ["z"]}]}
    datasets.Dataset.from_dict(nested).to_parquet(path)
    found = read_examples(path, Fields(label="answers.text", answers=True))
    assert found == [Example("a", "x", references=("x", "y")), Example("b", "z")]
    with pytest.raises(UserError, match="row 1: no column 'answers.words', found text, answers"):
        read_examples(path, Fields(label="answers.words"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="is not a Parquet file, or damaged") as caught:
        read_examples(path)
    assert "\n" not in str(caught.value)


def test_labels_of_a_parquet_file_with_gaps(tmp_path):
    path = tmp_path / "x.parquet"
    datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0.0, float("nan"), 1.0]}).to_parquet(path)
    with pytest.raises(UserError, match="row 2: the label is empty: fill it in or remove the row"):
        read_examples(path)
    found = read_examples(path, Fields(skip=("",)))  # --skip-labels= leaves them out
    assert [example.label for example in found] == ["0", "1"]
    assert read_examples(path, Fields(label_names=("bad", "good"), skip=("",)))[1].label == "good"


def test_a_folder_of_datasets(tmp_path):
    dataset().save_to_disk(str(tmp_path / "one"))
    assert read_examples(tmp_path / "one") == read_examples(tmp_path / "one", split="train") == NAMED
    parts = {"train": dataset(), "validation": dataset(text=["cold"], label=[0])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "parts"))
    assert read_examples(tmp_path / "parts", split="train") == NAMED
    assert read_examples(tmp_path / "parts", split="validation") == [Example("cold", "bad")]
    with pytest.raises(UserError, match="has no split 'test': choose one of train, validation with --split"):
        read_examples(tmp_path / "parts", split="test")
    with pytest.raises(UserError, match="validation, row 1: label 'bad' is not one of 'good'"):
        read_examples(tmp_path / "parts", labels=["good"], split="validation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a folder that `datasets` saved"):
        read_examples(tmp_path / "empty")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read, it may be damaged"):
        read_examples(tmp_path / "one")


def test_a_dataset_of_the_hub(monkeypatch):
    asked = []

    def load(*arguments, **keywords):
        asked.append((arguments, keywords))
        return dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    told = []
    found = read_examples("hub:owner/name:config@refs/convert/parquet", split="train", say=told.append)
    assert found == NAMED and told == ["reading hub:owner/name:config@refs/convert/parquet, split train"]
    assert asked == [(("owner/name", "config"), {"split": "train", "revision": "refs/convert/parquet"})]
    next(read_rows("hub:name"))
    assert asked[1] == (("name", None), {"split": None, "revision": None})


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hub:nobody/nothing cannot be had from the hub: .*network") as caught:
        read_examples("hub:nobody/nothing", split="train")
    assert "\n" not in str(caught.value)

    def old(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported, but found name.py")

    monkeypatch.setattr(datasets, "load_dataset", old)
    with pytest.raises(UserError, match="Dataset scripts are no longer supported"):
        read_examples("hub:owner/name")


@pytest.mark.parametrize("name, package", [("x.parquet", "pyarrow"), ("folder", "datasets"), ("hub:a/b", "datasets")])
def test_a_package_that_is_missing(tmp_path, monkeypatch, name, package):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "dataset_info.json").write_text("{}")
    real = builtins.__import__

    def without(wanted, *arguments, **keywords):
        if wanted.split(".")[0] == package:
            raise ImportError(f"no {package}")
        return real(wanted, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    source = name if name.startswith("hub:") else tmp_path / name
    with pytest.raises(UserError, match=rf"need.* the package {package}: pip install 'adazeta-kernels\[data\]'"):
        read_examples(source)


def words(count, labels="abc"):
    return [Example(f"text {i}", labels[i % len(labels)]) for i in range(count)]


def test_shots_are_so_many_of_each_class_and_drawn_by_the_seed(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": e.text, "label": e.label}) + "\n" for e in words(90)))
    splits = load_splits(str(path), shots=4)
    for name in ("train", "dev"):
        assert Counter(e.label for e in splits[name]) == dict.fromkeys("abc", 4)
    assert not set(splits["train"]) & set(splits["dev"])
    assert load_splits(str(path), shots=4) == splits != load_splits(str(path), shots=4, shots_seed=13)
    (tmp_path / "dev.jsonl").write_text(path.read_text().splitlines()[0] + "\n")
    splits = load_splits(str(path), shots=29, dev_source=str(tmp_path / "dev.jsonl"))
    assert [len(splits[name]) for name in ("train", "dev")] == [87, 1]
    assert splits["dev"][0] not in splits["train"]


def test_too_few_shots_and_no_classes():
    assert take_shots(words(12), 2) == take_shots(words(12)[::-1], 2)
    message = r"--shots 3 takes 6 examples labelled 'a' \(3 to train, 3 for dev\), but there are 4"
    with pytest.raises(UserError, match=message):
        take_shots([Example(f"text {i}", "ab"[i > 3]) for i in range(12)], 3)
    answers = [Example(f"text {i}", f"answer {i}") for i in range(12)]
    assert [len(part) for part in take_shots(answers, 5, fields=Fields(answers=True))] == [5, 5]
    with pytest.raises(UserError, match="takes 14 examples .*, but there are 12"):
        take_shots(answers, 7, fields=Fields(answers=True))


def test_wrong_turns_with_data_are_one_line(world, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # it tries for half a minute
    folder, _ = world
    (tmp_path / "one.csv").write_text("text,label\n" + "".join(f"film {i},positive\n" for i in range(9)))
    dev = tmp_path / "dev.csv"
    dev.write_text("text,label\nfilm a,positive\nfilm b,postive\n")
    for flags, message in [
        (("--data", tmp_path / "one.csv"), "examples of two labels or more"),
        (("--data", tmp_path / "one.csv", "--task", "head"), "has only ['positive'] to train on"),
        (("--dev-data", dev), "dev.csv, line 3: label 'postive' is not one of 'negative', 'positive'"),
        (("--dev-data", dev, "--task", "head"), "dev.csv, line 3: label 'postive' is not one of"),
        (("--data", "hub:nobody/nothing"), "hub:nobody/nothing cannot be had from the hub"),
        (("--data", tmp_path), "is not a folder that `datasets` saved"),
        (("--shots", 40), "--shots 40 takes 80 examples labelled"),
        (("--shots", 0), "--shots: expected an integer of at least 1"),
        (("--columns", "text"), "--columns: expected name=value,name=value"),
        (("--columns", "words=text"), "--columns: the template has no {words}, but text"),
        (("--template", "{premise} {hypothesis}"), "no column 'premise', found text, label"),
        (("--data", "movies", "--template", "{a} {b}"), "the movie sentences have one column, not a, b"),
    ]:
        assert message in fails(capsys, *train_command(folder, "bad"), *flags)
    assert not (folder / "bad").exists() and not (folder / "bad.partial").exists()
    message = fails(capsys, "eval", folder / "run", "--data", dev)
    assert "dev.csv, line 3: label 'postive' is not one of" in message
    message = fails(capsys, "eval", folder / "run", "--data", dev, "--split", "train")
    assert "--split train" in message and "has no parts: leave --split out" in message
    message = fails(capsys, "eval", folder / "run")
    assert "give --data with rows to measure on: the run was trained on" in message
