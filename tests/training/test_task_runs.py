"""Every kind of task from the command line on a tiny model: trained, better than before, evaluated, asked."""

import json
import shutil

import pytest
import torch
from families import SETTINGS
from tiny_run import BAD, GOOD, write_model
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer, BertModel

from adazeta import cli
from adazeta.base_models import architecture
from adazeta.data import Example
from adazeta.errors import UserError
from adazeta.runs import Classifier
from adazeta.tasks.head import HeadTask

SMALL = ("--steps", 20, "--batch-size", 8, "--eps", 0.02, "--queries", 8, "--rank", 2, "--bottleneck", 8, "--layers", 1)
SMALL += ("--save-every", 100)  # a checkpoint takes as long as ten of these steps
SETTLED = ("--positions", "all", "--directions", 2, "--threads", 1, "--dtype", "float32", "--eval-every", 20)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders: a causal model, a masked one, an encoder without a head, an encoder-decoder."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "causal")
    tokenizer = AutoTokenizer.from_pretrained(folder / "causal")
    tokenizer.add_special_tokens({"mask_token": "<mask>", "eos_token": "<eos>"})
    kinds = {
        "masked": ("bert", AutoModelForMaskedLM),
        "encoder": ("bert", None),
        "seq2seq": ("t5", AutoModelForSeq2SeqLM),
    }
    for name, (family, auto) in kinds.items():
        torch.manual_seed(0)
        more = {
            "vocab_size": len(tokenizer),
            "pad_token_id": 0,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
        }
        config = AutoConfig.for_model(family, **{**SETTINGS[family], **more, "eos_token_id": tokenizer.eos_token_id})
        model = auto.from_config(config) if auto else BertModel(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Labelled texts, the same as a choice between answers, and with answers to be said."""
    folder, rows = tmp_path_factory.mktemp("data"), []
    for index in range(96):
        words, label = ((GOOD, "positive"), (BAD, "negative"))[index % 2]
        rows.append({"text": f"{words[index // 2 % 4]} no {index}", "label": label})
    answers = {"positive": "yes", "negative": "no!"}
    kinds = {
        "labels": rows,
        "choices": [{**r, "label": answers[r["label"]], "choices": ["no!", "yes"]} for r in rows],
        "answers": [{**r, "label": answers[r["label"]]} for r in rows],
    }
    for name, lines in kinds.items():
        for part, chosen in (("", lines[32:]), ("-dev", lines[:32])):
            (folder / f"{name}{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chosen))
    return folder


def main(capsys, *arguments):
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


RANDOM = ("--head-start", "random")  # a fitted one has learned these few words before the first step
CASES = [
    ("causal", "labels", (), "label-words", 0.05),
    ("masked", "labels", ("--template", "{text}{mask}"), "label-words", 0.05),
    ("seq2seq", "labels", ("--template", "{text}", "--layers", "0-1"), "label-words", 0.05),
    ("encoder", "labels", (*RANDOM, "--pooling", "own"), "head", 0.03),
    ("encoder", "labels", (*RANDOM, "--pooling", "mean", "--layers", "0-1", "--steps", 40), "head", 0.01),
    ("encoder", "labels", (*RANDOM, "--layers", "0-1", "--steps", 40), "head", 0.01),  # --pooling attention
    ("encoder", "labels", (*RANDOM, "--pooling", "mean", "--layers", "0", "--depth", 1, "--steps", 40), "head", 0.01),
    ("masked", "labels", (*RANDOM, "--task", "head", "--labels", "negative,positive"), "head", 0.03),
    ("masked", "labels", ("--task", "head", *RANDOM, "--head", "tt", "--steps", 40), "head", 0.03),
    ("causal", "labels", (*RANDOM, "--task", "head"), "head", 0.03),
    ("causal", "choices", ("--task", "choice"), "choice", 0.05),
    ("causal", "answers", ("--task", "completion"), "completion", 0.05),
    ("seq2seq", "answers", ("--task", "completion"), "completion", 0.05),
]


@pytest.mark.parametrize("model, source, more, kind, lr", CASES)
def test_a_run_of_each_kind(models, data, tmp_path, capsys, model, source, more, kind, lr):
    run, path, dev = tmp_path / "run", data / f"{source}.jsonl", data / f"{source}-dev.jsonl"
    files = ("--model", models / model, "--data", path, "--dev-data", dev, "--output", run)
    code, out, err = main(capsys, "train", *files, *SMALL, *SETTLED, "--lr", lr, *more)
    assert code == 0, err
    summary = json.loads((run / "summary.json").read_text())
    assert summary["task"]["kind"] == kind
    before, after = summary["dev"]["before"], summary["dev"]["after"]
    print(before, after)
    assert after["loss"] < before["loss"] - 0.02 and 0 <= after["accuracy"] <= 1
    code, out, err = main(capsys, "eval", run, "--data", dev, "--json", "--threads", 1)
    assert code == 0, err
    assert {name: json.loads(out)[name] for name in after} == pytest.approx(after, abs=1e-5)
    asked = ["a warm film", "dull"]
    if kind == "choice":
        code, out, err = main(capsys, "predict", run, *asked)
        assert code == 2 and 'give {"text": ..., "choices": ...} as JSON, or --data FILE' in err
        asked = [json.dumps({"text": text, "choices": ["no!", "yes", "perhaps"]}) for text in asked]
    code, out, err = main(capsys, "predict", run, *asked, "--json", "--threads", 1)
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["text"] for line in lines] == ["a warm film", "dull"]
    assert all(("answer" if kind == "completion" else "probabilities") in line for line in lines)
    if kind == "choice":
        assert all(list(line["probabilities"]) == ["no!", "yes", "perhaps"] for line in lines)
    code, out, err = main(capsys, "replay", run)
    assert code == 0 and "bit for bit" in out, err
    code, out, err = main(capsys, "info", run)
    assert code == 0 and kind in out


def test_the_depth_that_is_found_stays_with_the_run(models, data, tmp_path, capsys):
    run, files = tmp_path / "run", ("--model", models / "encoder", "--data", data / "labels.jsonl")
    more = ("--layers", "middle", "--lr", 0.01, "--output", run)  # --pooling attention --depth auto
    code, out, err = main(capsys, "train", *files, *SMALL, *SETTLED, *more)
    assert code == 0, err
    card = json.loads((run / "adazeta.json").read_text())
    depth = card["task"]["depth"]
    assert depth == card["settings"]["depth"] and f"depth {depth} of 2 blocks: " in err
    code, out, err = main(capsys, "predict", run, "a warm film", "--json", "--threads", 1)
    assert code == 0, err
    assert Classifier.open(str(run)).model.config.num_hidden_layers == depth
    code, out, err = main(capsys, "replay", run)
    assert code == 0 and "bit for bit" in out, err
    code, out, err = main(capsys, "info", run)
    assert code == 0 and f"attention, behind block {depth}\n" in out
    code, out, err = main(capsys, "eval", run, "--data", data / "labels-dev.jsonl", "--depth", "auto")
    assert code == 2 and "--depth auto is for a run that begins" in err


def test_a_tokenizer_of_another_model_is_told(models, tmp_path, capsys):
    shutil.copytree(models / "causal", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    known = json.loads((tmp_path / "base" / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<{index}>" for index in range(known)])
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"text": f"<{known - 1}> film {i}", "label": ("positive", "negative")[i % 2]} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--model", tmp_path / "base", "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "run")
    code, _, err = main(capsys, "train", *given, *SMALL, *SETTLED)
    assert code == 2 and f"'<{known - 1}>' token " in err and f"the model knows {known} (0 to {known - 1})" in err


def test_an_end_token_in_a_text_is_named(models):
    """A head of an encoder-decoder reads the state at the last one, and transformers wants as many in every row."""
    tokenizer = AutoTokenizer.from_pretrained(models / "seq2seq")
    examples = [Example(text, label) for text, label in (("fine<eos>", "a"), ("a <eos> good film<eos>", "b"))]
    with pytest.raises(UserError, match="'a <eos> good film<eos>' holds <eos>, by which the head"):
        HeadTask(("a", "b")).encode(tokenizer, examples, seq2seq=True)
    with pytest.raises(UserError, match="does not end texts with <eos>, by which the head"):
        HeadTask(("a", "b")).encode(tokenizer, [Example("fine", "a"), Example("a film", "b")], seq2seq=True)
    assert len(HeadTask(("a", "b")).encode(tokenizer, examples, seq2seq=False)) == 2


def test_a_fitted_head_is_where_the_run_begins(models, data, tmp_path, capsys):
    run, dev = tmp_path / "run", data / "labels-dev.jsonl"
    files = ("--model", models / "encoder", "--data", data / "labels.jsonl", "--dev-data", dev, "--output", run)
    given = (*files, *SMALL, *SETTLED, "--lr", 0.01, "--eval-limit", 20)
    code, out, err = main(capsys, "train", *given, "--dp-noise", 1, "--head-start", "fitted")
    assert code == 2 and "--head-start fitted looks at the data without noise" in err and not run.exists()
    code, out, err = main(capsys, "train", *given)
    assert code == 0 and "head begins as logistic regression on the frozen model's features: loss 0." in err, err
    assert f"labels-dev.jsonl: 20 of {len(dev.read_text().splitlines())} rows are dev (--eval-limit)" in err
    dev = json.loads((run / "summary.json").read_text())["dev"]
    assert dev["after"]["loss"] <= dev["before"]["loss"] < 0.4  # log 2 is a guess
    assert "where loss on dev was best" in err
    code, out, err = main(capsys, "replay", run)
    assert code == 0 and "bit for bit" in out, err


def test_architectures(models, tmp_path):
    assert [architecture(models / name) for name in ("causal", "masked", "encoder", "seq2seq")] == [
        "causal",
        "masked",
        "encoder",
        "seq2seq",
    ]
    (tmp_path / "config.json").write_text(
        '{"model_type": "bart", "architectures": ["BartModel"], "is_encoder_decoder": true}'
    )
    assert architecture(tmp_path) == "seq2seq"
    (tmp_path / "config.json").write_text('{"model_type": "mystery"}')
    with pytest.raises(UserError, match="model type 'mystery' is not known"):
        architecture(tmp_path)


@pytest.mark.parametrize(
    "model, source, more, message",
    [
        ("masked", "labels", ("--template", "{text} is"), "put {mask} into template"),
        ("causal", "labels", ("--template", "{mask} is {text}"), "goes on where the prompt ends"),
        ("masked", "labels", ("--label-words", "negative=bad,positive=good"), "words of one token"),
        ("masked", "choices", ("--task", "choice"), "causal or encoder-decoder"),
        ("masked", "answers", ("--task", "completion"), "causal or encoder-decoder"),
        ("encoder", "labels", ("--task", "label-words"), "no language-model head"),
        ("encoder", "labels", ("--dtype", "bfloat16"), "needs float32"),
        ("encoder", "labels", ("--pooling", "own", "--depth", 1), "--depth is for --pooling mean or attention"),
        ("encoder", "labels", ("--pooling", "mean", "--depth", 3), "--depth 3: "),
        ("encoder", "labels", ("--pooling", "mean", "--depth", 0), "at least 1, got '0'"),
        ("encoder", "labels", ("--pooling", "mean", "--depth", 1, "--layers", 1), "block"),
        (
            "encoder",
            "labels",
            ("--pooling", "mean", "--depth", "auto", "--dp-noise", 1),
            "without noise: give a private",
        ),
        ("encoder", "labels", ("--labels", "positive"), "at least two different labels"),
        ("encoder", "labels", ("--labels", "good,bad"), "label 'positive' is not one of 'good', 'bad'"),
        ("causal", "labels", ("--task", "choice"), "no column 'choices'"),
        ("causal", "labels", ("--task", "sing"), "expected one of auto, label-words"),
    ],
)
def test_what_does_not_fit_is_one_line(models, data, tmp_path, capsys, model, source, more, message):
    arguments = ("--model", models / model, "--data", data / f"{source}.jsonl", "--output", tmp_path / "run")
    code, out, err = main(capsys, "train", *arguments, *SMALL, *SETTLED, *more)
    assert code == 2 and message in err.splitlines()[-1], err
    assert not (tmp_path / "run").exists()
