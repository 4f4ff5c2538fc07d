import json
import random

import pytest

from adazeta.data import (
    Example,
    Prompts,
    RightPad,
    load_splits,
    read_examples,
    read_movies,
    split_examples,
)
from adazeta.errors import UserError
from adazeta.examples import Fields
from adazeta.grouped import LengthGrouped


def examples(count):
    return [Example(f"sentence number {index}", "ab"[index % 2]) for index in range(count)]


def test_csv_tsv_and_jsonl_read_the_same(tmp_path):
    rows = [('a, quoted "text"', "good"), ("naïve café", "bad")]
    (tmp_path / "x.csv").write_text('text,label\n"a, quoted ""text""",good\nnaïve café,bad\n', encoding="utf-8-sig")
    (tmp_path / "x.tsv").write_text('label\ttext\ngood\t"a, quoted ""text"""\nbad\tnaïve café\n', encoding="utf-8")
    lines = [json.dumps({"text": text, "label": label, "more": 1}) for text, label in rows]
    (tmp_path / "x.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    expected = [Example(*row) for row in rows]
    for name in ("x.csv", "x.tsv", "x.jsonl"):
        assert read_examples(tmp_path / name) == expected


def test_columns_can_be_named_and_labels_may_be_numbers(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"sentence": " a film ", "class": 1}\n')
    found = read_examples(path, Fields({"text": "sentence"}, "class"), labels=["0", "1"])
    assert found == [Example("a film", "1")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "text,label\n", "holds no examples"),
        ("x.csv", "", "holds no examples"),
        ("x.jsonl", "\n", "holds no examples"),
        ("x.csv", "sentence,label\na,good\n", "no column 'text', found sentence, label"),
        ("x.csv", "text,label\na\n", "no column 'label'"),
        ("x.csv", "text,label\na,good\nb,fine\n", "line 3: label 'fine' is not one of 'good', 'bad'"),
        ("x.csv", "text,label\n ,good\n", "line 2: the text is empty"),
        ("x.jsonl", '{"text": "a", "label": "good"}\n{"text"\n', "line 2: not JSON"),
        ("x.jsonl", "[1]\n", "line 1: expected an object"),
        ("x.txt", "a\tgood\n", "unknown kind of data file '.txt'"),
        ("x.csv", b"text,label\n\xff\xfe,good\n", "save it as UTF-8"),
        ("x.csv", "text,label\na\nb, c,good\n", "line 2: no column 'label'"),
        ("x.csv", "text,label\nwell, a film,good\n", "line 2: more cells than the header has columns, 3 for 2: put"),
        ("x.csv", "label,text\ngood,well, a film\n", "line 2: more cells than the header has columns, 3 for 2: put"),
        ("x.csv", 'text,label\na,good\n"b,bad\nc,bad\n', r"line 3: not CSV \(unexpected end of data\): a cell with"),
        ("x.csv", 'text,label\n"a" film,good\n', r"line 2: not CSV \(',' expected after"),
        ("x.csv", "text,label,text\na,good,b\n", "x.csv: more than one column is named 'text': rename or remove"),
        ("x.tsv", "text\tlabel\tlabel\na\tgood\tbad\n", "x.tsv: more than one column is named 'label'"),
        ("x.tsv", "text\tlabel\na\tfilm\tgood\n", "line 2: more cells than the header has columns, 3 for 2: in a .tsv"),
        ("x.tsv", 'label\ttext\ngood\t"a\nfilm"\n', "line 3: fewer cells than the header has columns, 1 for 2: in a"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        read_examples(path, labels=["good", "bad"])
    assert "\n" not in str(caught.value)


def test_a_text_of_a_tsv_may_begin_with_a_quotation_mark(tmp_path):
    path = tmp_path / "x.tsv"
    texts = ['"Good film', 'so "bad', '"Good" and "bad"', '"', "well, no", '"all of it"']
    path.write_text("text\tlabel\r\n" + "".join(f"{text}\tgood\r\n" for text in texts), newline="")
    found = [example.text for example in read_examples(path)]
    assert found == [*texts[:-1], "all of it"]  # what is quoted from end to end is unquoted, as spreadsheets write it


@pytest.mark.parametrize("name, separator", [("x.csv", ","), ("x.tsv", "\t")])
def test_a_text_may_be_long(tmp_path, name, separator):
    text = "a film " * 40_000
    (tmp_path / name).write_text(f"text{separator}label\n{text}{separator}good\n")
    assert read_examples(tmp_path / name) == [Example(text.strip(), "good")]


def test_numbers_with_gaps_are_integers_and_empty_cells(tmp_path):
    """pandas holds such a column as floats; NaN is its empty cell."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "label": 1.0}\n{"text": 7.0, "label": -1.0}\n{"text": 0.5, "label": 0.25}\n')
    assert read_examples(path) == [Example("a", "1"), Example("7", "-1"), Example("0.5", "0.25")]
    for row, message in (
        ('{"text": "a", "label": NaN}', "line 1: the label is empty"),
        ('{"text": NaN, "label": 1}', "line 1: the text is empty"),
        ('{"text": "a", "label": null}', "line 1: the label is empty"),
    ):
        path.write_text(row)
        with pytest.raises(UserError, match=message):
            read_examples(path)


def test_missing_file():
    with pytest.raises(UserError, match="no such data file: nowhere.csv"):
        read_examples("nowhere.csv")


def test_movie_rule(tmp_path):
    path = tmp_path / "movies.txt"
    path.write_text("1\t0.5\tgood one\r\n2\t-0.5\tbad one\r\n3\t0.49\tmeh\r\n4\t-3.1\t'' worst ''\r\n", newline="")
    assert read_movies(path) == [
        Example("good one", "positive"),
        Example("bad one", "negative"),
        Example("'' worst ''", "negative"),
    ]


def test_splits_do_not_depend_on_order_and_share_no_text():
    data = examples(200) + [Example("Sentence  NUMBER 7", "a"), Example("sentence number 8", "b")]
    splits = split_examples(data, test=40, dev=20)
    assert [len(splits[name]) for name in ("test", "dev", "train")] == [40, 20, 140]
    keys = [" ".join(e.text.casefold().split()) for part in splits.values() for e in part]
    assert len(set(keys)) == len(keys) == 200
    shuffled = examples(200)
    random.Random(1).shuffle(shuffled)
    assert split_examples(shuffled, test=40, dev=20) == splits
    assert split_examples(data, test=40, dev=20, seed=1) != splits


def test_splits_are_the_documented_ones():
    # First bytes of sha256("0\ta"), ..., from `printf '0\ta' | sha256sum`.
    order = [e.text for e in split_examples([Example(t, "a") for t in "abcd"])["train"]]
    digests = {
        "a": "88124601",
        "b": "aedae854",
        "c": "4779bc33",
        "d": "741b3f6e",
    }
    assert order == sorted("abcd", key=digests.__getitem__)


def test_the_same_question_with_other_candidates_or_answers_is_another_example(tmp_path):
    choices = [Example("which one?", "0", ("this", f"that {index}")) for index in range(20)]
    answers = [Example("name a film", f"film {index}") for index in range(20)]
    for data, keywords in ((choices, {}), (answers, {"answers": True})):
        splits = split_examples([*data, *data[:3]], dev=5, **keywords)
        assert [len(splits[name]) for name in ("train", "dev")] == [15, 5]
        assert set(splits["train"]) | set(splits["dev"]) == set(data)
        assert split_examples(data[::-1], dev=5, **keywords) == splits
    assert len(split_examples(answers)["train"]) == 1  # labels that are classes


def test_rows_left_out_are_told(tmp_path):
    path, dev = tmp_path / "train.jsonl", tmp_path / "dev.jsonl"
    rows = [*choice_rows(30), *choice_rows(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dev.write_text("".join(json.dumps(row) + "\n" for row in choice_rows(5)))
    told = []
    splits = load_splits(str(path), fields=Fields(choices=("choices",)), say=told.append)
    assert (len(splits["train"]), len(splits["dev"])) == (27, 3)
    assert told == [f"{path}: 4 of 34 rows left out, they repeat earlier ones"]
    splits = load_splits(str(path), dev_source=str(dev), fields=Fields(choices=("choices",)), say=told.append)
    assert (len(splits["train"]), len(splits["dev"])) == (25, 5)
    assert told[2:] == [f"{path}: 5 rows left out, they are in {dev} too"]


def choice_rows(count):
    return [{"text": "which one?", "label": 0, "choices": ["this", f"that {index}"]} for index in range(count)]


def test_an_empty_label_is_a_mistake_but_for_answers(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,label\na,good\nb, \n")
    with pytest.raises(UserError, match="line 3: the label is empty"):
        read_examples(path)
    assert read_examples(path, Fields(answers=True))[1] == Example("b", "")


def test_too_few_examples():
    with pytest.raises(UserError, match="5 different texts are too few for 4 test, 1 dev"):
        split_examples(examples(5), test=4, dev=1)


def test_load_splits_of_files(tmp_path):
    path, dev = tmp_path / "train.jsonl", tmp_path / "dev.jsonl"
    path.write_text("".join(json.dumps(vars(e)) + "\n" for e in examples(50)))
    dev.write_text("".join(json.dumps(vars(e)) + "\n" for e in examples(5)))
    alone = load_splits(str(path), labels="ab")
    assert (len(alone["train"]), len(alone["dev"]), alone["test"]) == (45, 5, [])
    both = load_splits(str(path), dev_source=str(dev), labels="ab")
    assert sorted(both["dev"], key=lambda e: e.text) == sorted(examples(5), key=lambda e: e.text)
    assert not {e.text for e in both["train"]} & {e.text for e in both["dev"]}
    with pytest.raises(UserError, match="every text of"):
        load_splits(str(dev), dev_source=str(path), labels="ab")


def test_the_first_dev_examples_are_of_all_classes(tmp_path):
    """Of a file that is sorted by its labels too: evaluations of a run may take the first ones only."""
    path, dev = tmp_path / "train.jsonl", tmp_path / "dev.jsonl"
    path.write_text("".join(json.dumps(vars(e)) + "\n" for e in examples(50)))
    rows = [{"text": f"dev {number}", "label": "ab"[number >= 300]} for number in range(600)]
    dev.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = load_splits(str(path), dev_source=str(dev), labels="ab")["dev"][:100]
    assert 30 <= sum(e.label == "a" for e in first) <= 70
    dev.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert load_splits(str(path), dev_source=str(dev), labels="ab")["dev"][:100] == first


def test_movies_need_their_labels():
    with pytest.raises(UserError, match="'negative' has no label word"):
        load_splits("movies", labels=["bad", "good"])


def test_collator_pads_on_the_right():
    batch = RightPad(9)([{"input_ids": [1, 2, 3], "labels": 1}, {"input_ids": [4], "labels": 0}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert all(str(tensor.dtype) == "torch.int64" for tensor in batch.values())


def test_prompts_by_length_and_empty():
    prompts = Prompts([[1], [1, 2, 3], [1, 2]], [0, 1, 0])
    assert [len(row["input_ids"]) for row in prompts.by_length()] == [3, 2, 1]
    assert prompts.by_length()[0]["labels"] == 1
    with pytest.raises(UserError, match="dataset is empty"):
        Prompts([], [])
    with pytest.raises(ValueError, match="2 prompts and 1 labels"):
        Prompts([[1], [2]], [0])


def test_length_grouping():
    generator = random.Random(0)
    lengths = [generator.randint(1, 50) for _ in range(203)]
    sampler = LengthGrouped(lengths, 4, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(203))
    assert len(sampler) == 203
    spread = [
        max(lengths[i] for i in order[first : first + 4]) - min(lengths[i] for i in order[first : first + 4])
        for first in range(0, 200, 4)
    ]
    assert sum(spread) / len(spread) < 3  # about 30 without grouping
    assert list(sampler) == order
    sampler.set_epoch(1)
    assert list(sampler) != order
    assert list(LengthGrouped(lengths, 4, seed=4)) != order
    assert list(LengthGrouped([1, 2, 3], 4, seed=0)) == [2, 1, 0]
