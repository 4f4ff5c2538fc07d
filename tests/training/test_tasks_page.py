"""The commands of docs/tasks.md run as they are printed, on a tiny model and small files of our own writing."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from families import SETTINGS
from tiny_run import ADAPTER, BAD, GOOD, SAME_BITS, fails, main, write_model
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

from adazeta import cli

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
QUICK = ("--steps", 10, "--save-every", 100, "--batch-size", 8, "--queries", 8, *SAME_BITS, *ADAPTER, "--rank", 2)
HYPOTHESES = {"entailment": "we liked it", "not_entailment": "we left early"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a causal model ``MODEL``, a masked one ``masked``, and the files of the page."""
    folder = tmp_path_factory.mktemp("page")
    write_model(folder / "MODEL")
    tokenizer = AutoTokenizer.from_pretrained(folder / "MODEL")
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.add_tokens([" Yes", " No"])
    torch.manual_seed(0)
    more = {"vocab_size": len(tokenizer), "pad_token_id": 0, "max_position_embeddings": 256, "initializer_range": 0.3}
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **{**SETTINGS["bert"], **more}))
    model.save_pretrained(folder / "masked")
    tokenizer.save_pretrained(folder / "masked")
    texts = [
        (f"{w} film {i}", y) for i in range(20) for w, y in zip((GOOD[i % 4], BAD[i % 4]), ("positive", "negative"))
    ]
    (folder / "reviews.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in texts))
    (folder / "unlabelled.csv").write_text(f"id,text\n1,warm\n2,dull\n3,{'long ' * 10_000}\n")
    with (folder / "pairs.jsonl").open("w") as stream:
        for index, (text, label) in enumerate(texts):
            follows = ("not_entailment", "entailment")[(label == "positive") == (index % 4 < 2)]
            row = {"premise": f"It was {text}.", "hypothesis": HYPOTHESES[follows], "label": follows}
            stream.write(json.dumps(row) + "\n")
    return folder


def run(capsys, command, *more):
    code, out, err = main(capsys, *command[1:], *more)
    assert code == 0, err
    return out, err


def test_the_commands_of_the_page_are_these():
    known = [("pip",), ("adazeta", "train"), ("adazeta", "predict"), ("adazeta", "eval"), ("adazeta", "templates")]
    assert all(any(tuple(c[: len(k)]) == k for k in known) for c in COMMANDS) and len(COMMANDS) == 17
    for command in COMMANDS:
        if command[0] == "adazeta" and ">" not in command:
            cli.build_parser().parse_args(command[1:])  # ends the process where a flag is none


def test_three_commands(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    install, train, predict = COMMANDS[:3]
    assert install[:2] == ["pip", "install"]
    out, err = run(capsys, train, "--model", "MODEL", *QUICK)
    assert "written to runs/reviews; ask it: adazeta predict runs/reviews --data FILE" in out
    assert "--max-tokens" not in err
    out, err = run(capsys, predict, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert all(row["label"] == max(row["probabilities"], key=row["probabilities"].get) for row in rows)
    assert rows[2]["text"].startswith("long long") and len(rows) == 3
    ordered = [
        run(capsys, ["adazeta", "predict", "runs/reviews", *rest])[0]
        for rest in (("--json", "a", "b"), ("a", "b", "--json"))
    ]
    assert ordered[0] == ordered[1] and len(ordered[0].splitlines()) == 2
    assert err.count("1 of 3 prompts are longer than --max-tokens 256: their texts lose the end") == 1


def test_a_head(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    encoder, tokenizer = (kind.from_pretrained(folder / "masked") for kind in (AutoModel, AutoTokenizer))
    for part in (encoder, tokenizer):
        part.save_pretrained("minilm")  # a folder of that name goes before what would be fetched
    _, err = run(capsys, next(c for c in COMMANDS if "runs/head" in c), *QUICK)
    assert "the model has no head: it gets --pooling attention" in err
    out, err = run(capsys, ["adazeta", "predict", "runs/head", "warm film", "--json"])
    assert json.loads(out)["label"] == "positive"


def test_a_template_of_several_columns(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    train = next(c for c in COMMANDS if "{premise}" in " ".join(c))
    rows = (folder / "pairs.jsonl").read_text()
    (folder / "pairs.jsonl").write_text(rows.replace('"not_entailment"', '"no"').replace('"entailment"', '"yes"'))
    run(capsys, train, *QUICK, "--lr", 0.02)
    for command in COMMANDS:
        if "runs/pairs" in command and "train" not in command:
            out, err = run(capsys, command)
            assert "accuracy" in out or json.loads(out.splitlines()[0])["label"] in ("yes", "no")
    assert 'this run has several columns: give {"premise": ..., "hypothesis": ...}' in fails(
        capsys, "predict", "runs/pairs", "It rained."
    )
    assert "no column 'hypothesis', found premise" in fails(
        capsys, "predict", "runs/pairs", '{"premise": "It rained."}'
    )
    with pytest.raises(SystemExit):
        cli.main(["predict", "runs/pairs", "--jason", "text"])
    assert "unrecognized arguments: --jason" in capsys.readouterr().err
    (folder / "pairs.jsonl").write_text(rows)


@pytest.mark.parametrize("model", ["MODEL", "masked"])
def test_a_dataset_template_from_a_few_examples(folder, capsys, monkeypatch, model):
    monkeypatch.chdir(folder)
    own, changed = [c for c in COMMANDS if "train" in c and "pairs.jsonl" in c and "{premise}" not in " ".join(c)]
    out, _ = main(capsys, "templates", "rte")[1:]
    Path("rte.yaml").write_text(out)
    own[own.index("--model") + 1] = changed[changed.index("--model") + 1] = model
    quick = (*QUICK, "--steps", 16, "--positions", "all", "--layers", "1", "--lr", 0.03, "--shots", 8, "--eps", 0.02)
    run(capsys, own, *quick, "--overwrite")
    card = json.loads(Path("runs/own/adazeta.json").read_text())
    assert card["task"]["label_words"] == {"entailment": " Yes", "not_entailment": " No"}
    assert card["task"]["template"].endswith("{mask}." if model == "masked" else "Does the hypothesis follow?")
    summary = json.loads(Path("runs/own/summary.json").read_text())
    assert summary["splits"] == {"train": 16, "dev": 16, "test": 0}
    assert summary["dev"]["after"]["loss"] < summary["dev"]["before"]["loss"] - 0.02
    if model == "MODEL":
        run(capsys, changed, *quick, "--steps", 1)
        changed_card = json.loads(Path("runs/changed/adazeta.json").read_text())
        assert changed_card["task"] == card["task"]


def test_the_python_of_the_page(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(example, "tasks.md", "exec"), {"words": {"warm": "positive", "dull": "negative"}})
    command = ("train", "--data", "reviews", "--model", folder / "MODEL", *QUICK, "--steps", 2, "--output", "run")
    code, out, err = main(capsys, *command)
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["splits"] == {"train": 36, "dev": 4, "test": 0}


def test_a_device_that_is_not_there(folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    files = ("--model", folder / "MODEL", "--data", folder / "reviews.csv", "--output", folder / "runs" / "gpu")
    message = "--device cuda: torch finds no GPU here; leave it out to compute on the CPU"
    assert message in fails(capsys, "train", *files, "--device", "cuda")
    assert message in fails(capsys, "predict", folder / "MODEL", "a film", "--device", "cuda")
    assert not (folder / "runs" / "gpu").exists() and not (folder / "runs" / "gpu.partial").exists()
