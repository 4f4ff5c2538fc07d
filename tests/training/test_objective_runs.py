"""Runs from the command line whose aim has no gradient: better after than before, and what is measured of them."""

import json

import pytest
from test_metrics import by_definition
from tiny_run import BAD, GOOD, fails, main, write_model

from adazeta.best import best_metric
from adazeta.errors import UserError
from adazeta.journal import read
from adazeta.measures import Aim
from adazeta.metrics import exact_match, token_f1
from adazeta.runs import Classifier

ADAPTER = ("--rank", 2, "--bottleneck", 8, "--layers", "0-1", "--positions", "all")
STEPS = ("--save-every", 100, "--batch-size", 8, "--eps", 0.2, "--lr", 0.1, "--directions", 2, "--eval-every", 100)
SMALL = (*ADAPTER, *STEPS, "--threads", 1, "--dtype", "float32", "--gemm", "plain")
SCORE = '''
def letters(prompt, completion, reference):
    """The share of letters in the first four characters that are said, if the prompt and the reference are there."""
    assert " no " in prompt and reference in ("yes", "no!")
    return sum(c.isascii() and c.isalpha() for c in completion[:4]) / 4


def same(prompt, completion, reference):
    return 2.0 * (completion == reference)


def broken(prompt, completion, reference):
    return {}[prompt]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, texts with labels and with answers, and a file with functions."""
    folder = tmp_path_factory.mktemp("objectives")
    write_model(folder / "base")
    rows = []
    for index in range(96):
        words, label = ((GOOD, "positive"), (BAD, "negative"))[index % 2]
        rows.append({"text": f"{words[index // 2 % 4]} no {index}", "label": label})
    answers = [{**row, "label": {"positive": "yes", "negative": "no!"}[row["label"]]} for row in rows]
    for name, lines in (("labels", rows), ("answers", answers)):
        for part, chosen in (("", lines[32:]), ("-dev", lines[:32])):
            (folder / f"{name}{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chosen))
    (folder / "score.py").write_text(SCORE)
    return folder


def files(folder, kind: str, run: str) -> tuple:
    data, dev = folder / f"{kind}.jsonl", folder / f"{kind}-dev.jsonl"
    return "--model", folder / "base", "--data", data, "--dev-data", dev, "--output", folder / run


def train(capsys, folder, kind: str, run: str, *more) -> dict:
    code, out, err = main(capsys, "train", *files(folder, kind, run), *SMALL, *more)
    assert code == 0, err
    return json.loads((folder / run / "summary.json").read_text())


def test_accuracy_gets_better(folder, capsys):
    """Towards the accuracy of label words, with F1 measured next to it."""
    summary = train(capsys, folder, "labels", "run", "--objective", "accuracy", "--metric", "f1", "--steps", 30)
    before, after = summary["dev"]["before"], summary["dev"]["after"]
    print(before, after)
    assert summary["objective"] == "accuracy" and after["accuracy"] > before["accuracy"] + 0.15
    assert read(folder / "run" / "journal.azj").header["config"]["objective"] == {"name": "accuracy"}
    dev = folder / "labels-dev.jsonl"
    code, out, err = main(capsys, "eval", folder / "run", "--data", dev, "--metric", "f1", "--json", "--threads", 1)
    assert code == 0, err
    assert {name: json.loads(out)[name] for name in after} == pytest.approx(after, abs=1e-5)
    texts = [json.loads(line) for line in dev.read_text().splitlines()]
    probabilities = Classifier.open(str(folder / "run")).probabilities([row["text"] for row in texts])
    predictions = [int(p[1] > p[0]) for p in probabilities]
    labels = [int(row["label"] == "positive") for row in texts]
    assert after["f1"] == pytest.approx(by_definition(predictions, labels), abs=1e-6)
    code, out, err = main(capsys, "replay", folder / "run")
    assert code == 0 and "bit for bit" in out, err


def test_a_function_of_ones_own_gets_better(folder, capsys):
    """Towards a score of generated answers; the function is part of the run, and asked for again to go on."""
    score = f"{folder / 'score.py'}:letters"
    more = ("--task", "completion", "--objective", score, "--metric", "f1,exact-match", "--max-new-tokens", 4)
    summary = train(capsys, folder, "answers", "own", *more, "--steps", 15, "--queries", 4)
    before, after = summary["dev"]["before"], summary["dev"]["after"]
    print(before, after)
    assert summary["objective"] == "score.py:letters" and after["score"] > before["score"] + 0.15
    own = read(folder / "own" / "journal.azj").header["config"]["objective"]
    assert own["name"] == "score.py:letters" and len(own["sha256"]) == 64 and own["max_new_tokens"] == 4
    dev = folder / "answers-dev.jsonl"
    rows = [json.loads(line) for line in dev.read_text().splitlines()]
    classifier = Classifier.open(str(folder / "own"))
    texts = [row["text"] for row in rows]
    said = classifier.task.generate(classifier.model, classifier.tokenizer, texts, max_new_tokens=4)
    assert after["score"] == pytest.approx(sum(sum(c.isascii() and c.isalpha() for c in s[:4]) for s in said) / 4 / 32)
    for name, metric in (("f1", token_f1), ("exact_match", exact_match)):
        expected = sum(metric(s, row["label"]) for s, row in zip(said, rows)) / 32
        assert after[name] == pytest.approx(expected)
    lines = [json.loads(line) for line in (folder / "own" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "accuracy", "f1", "exact_match", "score"} <= set(lines[-1])
    for more, expected in (((), said[:2]), (("--max-new-tokens", 1), [s[:1].strip() for s in said[:2]])):
        code, out, err = main(capsys, "predict", folder / "own", *texts[:2], "--json", "--threads", 1, *more)
        assert code == 0, err  # needs no function
        assert [json.loads(line)["answer"] for line in out.splitlines()] == expected

    (folder / "own").rename(folder / "own.partial")  # as if it had been killed before its last rename
    resume = ("train", "--output", folder / "own", "--resume", "--objective", score)
    assert "another config.objective" in fails(capsys, *resume, "--max-new-tokens", 8)
    assert "another config.order (None, now 'random')" in fails(capsys, *resume, "--no-group-by-length")
    code, out, err = main(capsys, *resume)
    assert code == 0, err


def test_a_stored_run_runs_no_file(folder, capsys):
    """The card of a run names a file; --resume alone does not run it."""
    (folder / "stopped.partial" / "checkpoint-1").mkdir(parents=True)
    (folder / "stopped.partial" / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 1}')
    (folder / "evil.py").write_text("raise SystemExit('was run')\n")
    card = {"settings": {"objective": f"{folder / 'evil.py'}:score"}}
    (folder / "stopped.partial" / "adazeta.json").write_text(json.dumps(card))
    line = fails(capsys, "train", "--output", folder / "stopped", "--resume")
    assert "a file is run only where you name it" in line and "--objective" in line


@pytest.mark.parametrize(
    "kind, more, message",
    [
        ("labels", ("--objective", "f1", "--directions", "example"), "use --directions batch"),
        ("labels", ("--objective", "exact-match"), "compares answers, and task label-words has classes"),
        ("labels", ("--objective", "accuracy", "--eps", "auto"), "give --eps and --lr as numbers"),
        ("labels", ("--metric", "exact-match"), "compares answers, and task label-words has classes"),
        ("labels", ("--keep-best", "exact-match"), "expected a metric of dev, accuracy, loss"),
        ("labels", ("--metric", "f1", "--keep-best", "f2"), "expected a metric of dev, accuracy, f1, loss"),
        ("labels", ("--metric", "bleu"), "expected accuracy, f1 or exact-match, got 'bleu'"),
        ("labels", ("--objective", "reward"), "FILE.py:function, got 'reward'"),
        ("labels", ("--objective", "nowhere.py:score"), "cannot read nowhere.py: No such file"),
        ("labels", ("--objective", "{folder}/score.py:absent"), "has no function 'absent'"),
        ("labels", ("--objective", "{folder}/bad.py:score"), "bad.py fails: SyntaxError"),
        ("labels", ("--objective", "{folder}/score.py:broken"), "score.py:broken must return a number for prompt"),
    ],
)
def test_what_does_not_fit_is_one_line(folder, capsys, kind, more, message):
    (folder / "bad.py").write_text("def score(:\n")
    more = [str(value).format(folder=folder) for value in more]
    line = fails(capsys, "train", *files(folder, kind, "none"), *SMALL, "--steps", 1, *more)
    assert message in line, line
    assert not (folder / "none").exists()


def test_the_metric_that_decides_which_evaluation_is_best():
    settings = {"keep_best": "exact-match", "early_stopping": None, "metric": ["f1", "exact-match"]}
    settings |= {"task": "completion", "head_start": None, "dp_epsilon": None, "dp_noise": None}
    assert best_metric(settings, Aim("loss"), dev=True, processes=1) == "exact_match"  # its key in metrics.jsonl
    only_stops = {**settings, "keep_best": None, "early_stopping": 2}
    assert best_metric(only_stops, Aim("loss"), dev=True, processes=1) == "loss"
    assert best_metric({**only_stops, "early_stopping": None}, Aim("loss"), dev=False, processes=2) is None
    head = {**only_stops, "early_stopping": None, "task": "head"}  # which begins fitted
    assert best_metric(head, Aim("loss"), dev=True, processes=1) == "loss"
    assert best_metric({**head, "head_start": "random"}, Aim("loss"), dev=True, processes=1) is None
    assert best_metric(head, Aim("loss"), dev=False, processes=1) is None
    for wrong, message in (({"dev": False}, "need dev examples"), ({"processes": 2}, "for one process")):
        with pytest.raises(UserError, match=message):
            best_metric(settings, Aim("loss"), **{"dev": True, "processes": 1, **wrong})


@pytest.mark.parametrize("objective, steps", [("f1", 3), ("{folder}/score.py:same", 2)])
def test_classes_by_f1_and_by_a_function(folder, capsys, objective, steps):
    more = ("--objective", objective.format(folder=folder), "--steps", steps, "--queries", 2, "--eval-every", 1)
    summary = train(capsys, folder, "labels", f"classes-{steps}", *more, "--batch-size", 16)
    lines = [json.loads(line) for line in (folder / f"classes-{steps}" / "metrics.jsonl").read_text().splitlines()]
    name = "f1" if objective == "f1" else "score"
    dev = [line for line in lines if line["kind"] == "dev"]
    assert len(dev) > steps and all(0 <= line[name] <= 2 for line in dev)
    if name == "score":  # twice the accuracy, by the classes' names
        assert dev[-1]["score"] == pytest.approx(2 * dev[-1]["accuracy"])
    train_losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert all(-1 <= loss <= 1 for loss in train_losses) and summary["training"]["losses"] > 0
