"""Settings for public datasets: rows with the columns of each become the examples and prompts that are meant."""

import json

import pytest
import yaml
from tiny_run import fails, main, write_model
from transformers import AutoTokenizer

from adazeta import options
from adazeta.errors import UserError
from adazeta.examples import fields_of, read_examples
from adazeta.tasks import choose
from adazeta.tasks.prompts import fill
from adazeta.tasks.templates import entries

# A row of our own writing with the columns of the public dataset, and what must come of it: the end of the prompt, the
# label, and the word or the candidates it stands for.
NLI = {"premise": "A man plays a violin.", "hypothesis": "Somebody makes music."}
ROWS = {
    "sst2": ({"idx": 0, "sentence": "a warm film ", "label": 1}, "film All in all, it was", "positive", " great"),
    "sst5": ({"text": "so-so", "label": 2, "label_text": "neutral"}, "so-so All in all, it was", "neutral", " okay"),
    "mr": ({"text": "dull", "label": 0}, "dull All in all, it was", "neg", " terrible"),
    "trec": ({"text": "Who wrote it ?", "coarse_label": 3, "fine_label": 31}, "It asks for:", "HUM", " Human"),
    "rte": ({**NLI, "label": 0}, "Somebody makes music.\nDoes the hypothesis follow?", "entailment", " Yes"),
    "cb": ({**NLI, "label": 2}, "Does the hypothesis follow?", "neutral", " Maybe"),
    "mnli": ({**NLI, "label": 2}, "Does the hypothesis follow?", "contradiction", " No"),
    "snli": ({**NLI, "label": 1}, "Does the hypothesis follow?", "neutral", " Maybe"),
    "qnli": (
        {"question": "When was it built?", "sentence": "It was built in 1901.", "label": 0},
        "Sentence: It was built in 1901.\nDoes the sentence answer the question?",
        "entailment",
        " Yes",
    ),
    "boolq": (
        {"passage": "Tin melts at 232 C.", "question": "does tin melt", "label": False},
        "Tin melts at 232 C.\nQuestion: does tin melt?\nAnswer:",
        "False",
        " No",
    ),
    "wsc": (
        {"text": "Ann rang Bo because she was ill.", "span1_text": "Ann", "span2_text": "she", "label": 1},
        "In this text, is 'she' the same as 'Ann'?",
        "True",
        " Yes",
    ),
    "wic": (
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "A savings bank.", "label": 0},
        "2. A savings bank.\nDoes 'bank' mean the same in both sentences?",
        "False",
        " No",
    ),
    "multirc": (
        {"paragraph": "Eva ran home.", "question": "Who ran?", "answer": "Eva", "label": 1},
        "Proposed answer: Eva\nIs the proposed answer right?",
        "True",
        " Yes",
    ),
    "copa": (
        {"premise": "The lamp went out.", "choice1": "The bulb broke.", "choice2": "It rained.", "question": "cause"}
        | {"label": 0},
        "The lamp went out. What was the cause?",
        "0",
        ("The bulb broke.", "It rained."),
    ),
    "record": (
        {"passage": "Ann met Bo in Rome.", "query": "In @placeholder, it rained.", "entities": ["Ann", "Bo", "Rome"]}
        | {"answers": ["Rome"]},
        "Ann met Bo in Rome.\nIn",
        "Rome, it rained.",
        ("Ann, it rained.", "Bo, it rained.", "Rome, it rained."),
    ),
    "squad": (
        {"context": "Ann lives in Rome.", "question": "Where does Ann live?"}
        | {"answers": {"text": ["Rome", "in Rome"], "answer_start": [13, 10]}},
        "Question: Where does Ann live?\nAnswer:",
        "Rome",
        ("Rome", "in Rome"),
    ),
    "drop": (
        {"passage": "Two goals, then three.", "question": "How many goals?"}
        | {"answers_spans": {"spans": ["5"], "types": ["number"]}},
        "Two goals, then three.\nQuestion: How many goals?\nAnswer:",
        "5",
        (),
    ),
}


def of_template(name, row, path, architecture="causal"):
    """Return the task of a dataset template and the example that a file with one row holds."""
    path.write_text(json.dumps(row) + "\n")
    settings = options.resolve({"dataset_template": name}, options.TRAIN)
    task = choose({**settings, "labels": settings["label_names"]}, architecture)
    (example,) = read_examples(path, fields_of(settings, task), labels=task.labels)
    return task, example


def test_every_dataset_has_a_row_here():
    assert set(ROWS) == set(entries())


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_each_dataset(tmp_path, name):
    row, ending, label, stands_for = ROWS[name]
    task, example = of_template(name, row, tmp_path / "x.jsonl")
    prompt = fill(task.template, example.content)
    assert prompt.endswith(ending) and example.label == label
    assert "{" not in prompt and "@placeholder" not in prompt
    if task.kind == "label-words":
        assert dict(task.label_words)[label] == stands_for
        masked, _ = of_template(name, row, tmp_path / "x.jsonl", "masked")
        assert fill(masked.template, example.content, "<mask>") == f"{prompt} <mask>."
        head, example = of_template(name, row, tmp_path / "x.jsonl", "encoder")
        assert head.kind == "head" and head.labels[list(task.labels).index(label)] == label == example.label
        assert fill(head.template, example.content) == prompt
    else:
        assert (example.choices or example.references) == stands_for


@pytest.mark.parametrize("name", [name for name in ROWS if "label-names" in entries()[name]])
def test_labels_may_be_names_numbers_or_truth_values(tmp_path, name):
    row, _, label, _ = ROWS[name]
    column = entries()[name].get("label-column", "label")
    for spelled in (label, label.upper(), label.lower(), entries()[name]["label-names"].index(label)):
        assert of_template(name, {**row, column: spelled}, tmp_path / "x.jsonl")[1].label == label
    with pytest.raises(UserError, match="line 1: label 'yess' is not one of"):
        of_template(name, {**row, column: "yess"}, tmp_path / "x.jsonl")


def test_other_right_answers_are_no_wrong_candidates(tmp_path):
    row = {**ROWS["record"][0], "answers": ["Rome", "Bo"]}
    _, example = of_template("record", row, tmp_path / "x.jsonl")
    assert example.choices == ("Ann, it rained.", "Rome, it rained.") and example.label == "Rome, it rained."
    with pytest.raises(UserError, match="line 1: none of the answers"):
        of_template("record", {**row, "answers": ["Paris"]}, tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="line 1: no '@placeholder' in 'query'"):
        of_template("record", {**row, "query": "It rained."}, tmp_path / "x.jsonl")


def test_rows_without_a_gold_label_are_left_out(tmp_path):
    path, told = tmp_path / "x.jsonl", []
    path.write_text("".join(json.dumps({**NLI, "label": label}) + "\n" for label in (-1, 0, "-")))
    settings = options.resolve({"dataset_template": "snli"}, options.TRAIN)
    found = read_examples(path, fields_of(settings, choose(settings, "causal")), say=told.append)
    assert [example.label for example in found] == ["entailment"]
    assert told == [f"{path}: 2 rows left out, their label is '-1' or '-'"]


def test_an_entry_is_a_file_of_settings_and_flags_override_it(tmp_path, capsys):
    for name in entries():
        code, out, _ = main(capsys, "templates", name)
        (tmp_path / "run.yaml").write_text(out)
        from_file = options.read_yaml(str(tmp_path / "run.yaml"), options.TRAIN)
        values = options.resolve({}, options.TRAIN, from_file=from_file)
        assert values == {**options.resolve({"dataset_template": name}, options.TRAIN), "dataset_template": None}
        assert code == 0 and yaml.safe_load(out)["template"] == entries()[name]["template"]
    values = options.resolve({"dataset_template": "SST-2", "label_words": "negative=bad,positive=good"}, options.TRAIN)
    assert (
        values["label_words"] == {"negative": " bad", "positive": " good"} and values["data"] == "hub:nyu-mll/glue:sst2"
    )
    values = options.resolve({"dataset_template": "sst2"}, options.TRAIN, from_file={"data": "own.csv"})
    assert values["data"] == "own.csv" and values["template"].startswith("{sentence}")


def test_the_list_and_a_name_that_is_none(capsys):
    code, out, _ = main(capsys, "templates")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["name", *entries()]
    assert "no template for a dataset named 'sst3': did you mean sst5 or sst2?" in fails(capsys, "templates", "sst3")
    assert "no template for a dataset named 'zebra'" in fails(capsys, "train", "--dataset-template", "zebra")


def test_columns_of_other_names(tmp_path):
    (tmp_path / "x.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n")
    settings = options.resolve(
        {"dataset_template": "rte", "columns": "premise=sentence1,hypothesis=sentence2"}, options.TRAIN
    )
    (example,) = read_examples(tmp_path / "x.tsv", fields_of(settings, choose(settings, "causal")))
    assert example.content == {"premise": "a", "hypothesis": "b"} and example.text == "a\tb"
    with pytest.raises(UserError, match="the template has no {premiss}, but premise, hypothesis"):
        fields_of({**settings, "columns": {"premiss": "a"}}, choose(settings, "causal"))
    with pytest.raises(UserError, match="line 2: no column 'premise', found index, sentence1, sentence2, label"):
        read_examples(tmp_path / "x.tsv", fields_of({**settings, "columns": None}, choose(settings, "causal")))
    (tmp_path / "y.tsv").write_text("premise\thypothesis\tlabel\na\t \t0\n")
    with pytest.raises(UserError, match="line 2: the column 'hypothesis' is empty"):
        read_examples(tmp_path / "y.tsv", fields_of({**settings, "columns": None}, choose(settings, "causal")))


def test_of_several_columns_the_longest_loses_its_end_first(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_model(tmp_path / "model"))  # one token a byte
    from adazeta.tasks.prompts import encode_prompts

    told, content = [], {"a": "x" * 10_000, "b": "y" * 9}
    short, long = encode_prompts(tokenizer, "{a}|{b}:", [{"a": "p", "b": "q"}, content], 32, say=told.append)
    assert tokenizer.decode(short) == "p|q:"
    assert tokenizer.decode(long) == f"{'x' * 21}|{'y' * 9}:"
    assert told == [
        "1 of 2 prompts are longer than --max-tokens 32: their texts lose the end (the longest has 10,011 tokens)"
    ]
    content["b"] = "y" * 5_000
    (both,) = encode_prompts(tokenizer, "{a}|{b}:", [content], 32)
    assert tokenizer.decode(both) == f"{'x' * 15}|{'y' * 15}:"
    with pytest.raises(UserError, match="max_tokens = 3 leaves no room"):
        encode_prompts(tokenizer, "{a}|{b}:", [content], 3)


def test_a_text_with_the_name_of_a_column_stays_as_it_is():
    assert fill("{a} and {b}{mask}", {"a": "{b}", "b": "{mask}"}, "_") == "{b} and {mask}_"
    with pytest.raises(UserError, match="the template needs the columns a, b, got one text"):
        fill("{a} and {b}", "text")
