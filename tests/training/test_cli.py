"""The command line on a tiny model: training and what it leaves, evaluation, predictions, the demo."""

import json
import re
import sys

import pytest
from safetensors.torch import load_file
from tiny_run import PAPER, SMALL, adazeta, fails, main, train_command

from adazeta.commands import train
from adazeta.runs import read_metrics


def test_train_leaves_a_whole_run(world):
    folder, done = world
    files = {path.name for path in (folder / "run").iterdir()}
    assert files == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "adazeta.json",
        "curves.png",
        "journal.azj",
        "metrics.jsonl",
        "summary.json",
    }
    assert not (folder / "run.partial").exists()
    assert "accuracy, 6 dev sentences" in done.stdout
    assert "12 steps, 94 forward rows, 1,504 losses" in done.stdout  # 94 examples, 8 queries of 2 probes
    assert "12/12 steps" in done.stderr
    assert re.search(r"loss \d\.\d+, queries 8, [\d.]+ rows/s", done.stderr)
    assert "Warning" not in done.stderr


def test_metrics_and_summary_agree(world):
    folder, _ = world
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    dev = [line for line in lines if line["kind"] == "dev"]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert [line["step"] for line in train] == list(range(1, 13))
    assert (dev[0]["step"], dev[-1]["step"]) == (0, 12)
    assert {"rows", "seconds", "loss", "zo/queries", "rows_per_second"} <= train[0].keys()
    assert summary["training"]["steps"] == 12
    assert summary["training"]["rows"] == train[-1]["rows"]
    assert summary["training"]["losses"] == train[-1]["zo/losses"]
    assert summary["dev"]["after"] == {name: dev[-1][name] for name in ("accuracy", "loss")}
    saved = load_file(folder / "run" / "adapter_model.safetensors")
    assert summary["adapter"]["numbers"] == sum(tensor.numel() for tensor in saved.values())
    assert sum(float(tensor.abs().sum()) for tensor in saved.values()) > 0


def test_predict_in_a_new_process(world):
    folder, _ = world
    done = adazeta("predict", folder / "run", "a warm film", "naïve – “dull”", "--json")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["text"] for line in lines] == ["a warm film", "naïve – “dull”"]
    for line in lines:
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)


def test_eval_equals_the_last_dev_line(world, capsys, tmp_path):
    folder, _ = world
    from adazeta.data import load_splits

    dev = load_splits(str(folder / "data.jsonl"), labels=("negative", "positive"))["dev"]
    path = tmp_path / "dev.jsonl"
    path.write_text("".join(json.dumps(vars(example)) + "\n" for example in dev))
    code, out, _ = main(capsys, "eval", folder / "run", "--data", path, "--json")
    result, last = json.loads(out), read_metrics(folder / "run" / "metrics.jsonl")[-1]
    assert code == 0
    assert result["examples"] == 6
    assert result["accuracy"] == pytest.approx(last["accuracy"], abs=1e-6)
    assert result["loss"] == pytest.approx(last["loss"], abs=1e-4)
    code, out, _ = main(capsys, "eval", folder / "base", "--data", path)
    assert code == 0
    assert re.fullmatch(r"accuracy [01]\.\d{4}  loss \d\.\d{4}  \(6 examples of .*\)\n", out)


def test_predict_with_the_base_model_and_other_words(world, capsys, monkeypatch):
    folder, _ = world
    words = ("--template", r"{text}\nIt was", "--label-words", "bad=terrible,good=great")
    code, out, _ = main(capsys, "predict", folder / "base", "a film", *words)
    assert code == 0
    assert re.fullmatch(r"(bad|good)  \(bad [01]\.\d{3}  good [01]\.\d{3}\)  a film\n", out)
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    code, out, _ = main(capsys, "predict", folder / "run", "-")
    assert [line.rsplit("  ", 1)[1] for line in out.splitlines()] == ["one", "two"]


def test_info(world, capsys):
    folder, _ = world
    code, out, _ = main(capsys, "info", folder / "run")
    assert code == 0
    for expected in ("120 numbers in 1 tensors", "1 x down_proj", "[4, 4, 4 | 2, 2, 2]", "accuracy, dev"):
        assert expected in out
    code, out, _ = main(capsys, "info", folder / "base", "--rank", 2, "--bottleneck", 8)
    assert (code, "LlamaForCausalLM" in out, "192 numbers" in out) == (0, True, True)
    code, out, _ = main(capsys, "info", 4096)
    assert (code, "1,100 numbers" in out) == (0, True)
    assert "prime" in fails(capsys, "info", 8191)


def test_limits_in_rows_and_minutes(world, capsys):
    folder, _ = world
    for name, limit in (("rows", ("--rows", 40)), ("minutes", ("--max-minutes", 0))):
        code, _, err = main(capsys, *train_command(folder, name), *limit)
        assert code == 0, err
        lines = read_metrics(folder / name / "metrics.jsonl")
        train = [line for line in lines if line["kind"] == "train"]
        assert len(train) < 12
        assert lines[-1]["kind"] == "dev"  # the last step is evaluated
        assert lines[-1]["step"] == train[-1]["step"]
        if name == "rows":
            assert train[-2]["rows"] < 40 <= train[-1]["rows"]


def test_label_words_of_several_tokens_and_the_paper_preset(world, capsys):
    folder, _ = world
    words = ("--label-words", "negative=bad,positive=good", *PAPER)
    code, out, err = main(capsys, *train_command(folder, "paper"), *words)
    assert code == 0, err
    assert "12 steps, 376 forward rows" in out  # 94 examples, 2 probes, 2 label words
    code, out, _ = main(capsys, "info", folder / "paper")
    assert "768 numbers in 4 tensors" in out
    assert "2 x down_proj, 2 x o_proj" in out
    assert main(capsys, "replay", folder / "paper")[0] == 0
    assert main(capsys, "predict", folder / "paper", "a film")[0] == 0


def test_the_demo_on_a_small_scale(world, capsys, monkeypatch):
    from adazeta import data

    folder, _ = world
    examples = data.read_examples(folder / "data.jsonl")
    monkeypatch.setattr(data, "load_splits", lambda *a, **k: data.split_examples(examples, test=20, dev=6))
    defaults = {"model": str(folder / "base")}
    resolve = train.resolve
    monkeypatch.setattr(train, "resolve", lambda flags, *a, **k: resolve({**flags, **defaults}, *a, **k))
    code, out, err = main(capsys, "demo", *SMALL, "--output", folder / "demo")
    assert code == 0, err
    for expected in (
        "accuracy, 20 held-out sentences",
        "accuracy, 6 dev sentences",
        "peak memory above the model",
        "one estimate",
        "held-out sentence",
    ):
        assert expected in out
    summary = json.loads((folder / "demo" / "summary.json").read_text())
    assert len(summary["sentences"]) == 5
    assert summary["memory"]["allowed_bytes"] >= 16 << 20
    assert summary["memory"]["exact"] is (sys.platform == "linux")
    code, out, _ = main(capsys, "demo", *SMALL, "--output", folder / "demo")  # replaces the earlier one
    again = json.loads((folder / "demo" / "summary.json").read_text())
    assert (code, again["test"]) == (0, summary["test"])


def test_training_keeps_what_lies_below_the_adapters(world, capsys, tmp_path, monkeypatch):
    folder, _ = world
    monkeypatch.setenv("ADAZETA_CACHE", str(tmp_path))
    command = train_command(folder, "upper", "--layers", 1, "--steps", 14, "--positions", "all", "--queries", 2)
    summaries = []
    for setting in ("disk:1MB", "disk:1MB", "off"):
        code, _, err = main(capsys, *command, "--overwrite", "--prefix-cache", setting)
        assert code == 0 and "blocks below the first adapter (1) run once per example" in err
        assert ("1 MiB of files in" in err) is (setting != "off")
        summaries.append(json.loads((folder / "upper" / "summary.json").read_text()))
    training, again, off = ([summary[key] for key in ("prefix", "training", "dev")] for summary in summaries)
    assert training[0] == {"hits": 54, "misses": 54, "bytes": training[0]["bytes"]} and training[0]["bytes"] > 10**5
    assert again[0] == {"hits": 108, "misses": 0, "bytes": training[0]["bytes"]} and again[2] == training[2]
    assert off[0] == {"hits": 0, "misses": 108, "bytes": 0}
    assert off[1]["tokens"] == training[1]["tokens"] >= training[1]["real_tokens"] == off[1]["real_tokens"]
    assert 1 <= training[1]["tokens_over_real"] <= 1.1
    lines = [line for line in read_metrics(folder / "upper" / "metrics.jsonl") if line["kind"] == "train"]
    assert lines[-1]["tokens"] == off[1]["tokens"] and lines[-1]["real_tokens"] == off[1]["real_tokens"]
    assert "prefix-cache" in fails(capsys, *command, "--overwrite", "--prefix-cache", "2GiB")
