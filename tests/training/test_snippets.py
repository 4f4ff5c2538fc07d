"""Commands and Python of the guide and the pages behind it run as they are printed, on a tiny model and small files.

README, tasks.md, kernels.md and three sections of the guide have tests of their own; what starts several processes is
run by test_torchrun_snippets.py and test_split_bases.py; `make`, pip and benchmarks are in tests/packaging.
"""

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from test_trainer import dataset
from tiny import lm_batch, tiny_llama
from tiny_run import BAD, GOOD, SMALL, main, write_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments, default_data_collator

from adazeta import TTConfig, ZerothOrder
from adazeta.journal import read
from adazeta.losses import lm_loss
from adazeta.progress import Bar

DOCS = Path(__file__).resolve().parents[2] / "docs"
QUICK = (*SMALL, "--steps", 2)


def blocks(page: str, language: str, section: str | None = None) -> list[str]:
    """The blocks of code of a page, or of one of its sections."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    if section is not None:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The words of every ``adazeta`` command on a page, without the program."""
    lines = (line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines())
    return [words[1:] for words in (shlex.split(line, comments=True) for line in lines) if words[:1] == ["adazeta"]]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the files that the pages name, and a model by the name of the one that would be fetched."""
    folder = tmp_path_factory.mktemp("pages")
    tokenizer = AutoTokenizer.from_pretrained(write_model(folder / "smollm2"))
    tokenizer.add_tokens([" terrible", " great"])  # one token each, as in models that are no toys
    tokenizer.save_pretrained(folder / "smollm2")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder / "smollm2", vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "smollm2")
    texts = [(f"{words[i % 4]} film {i}", label) for i in range(50) for label, words in enumerate((BAD, GOOD))]
    for name, words in {"reviews": ("0", "1"), "held-out": ("0", "1"), "letters": ("negative", "positive")}.items():
        rows = "".join(f"{text},{words[label]}\n" for text, label in texts)
        (folder / f"{name}.csv").write_text(f"text,label\n{rows}")
    return folder


@pytest.fixture
def here(files, tmp_path, monkeypatch):
    """A fresh folder with these files, in which commands run."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *arguments) -> tuple[str, str]:
    code, out, err = main(capsys, *arguments)
    assert code == 0, err
    return out, err


def quick_but(*names: str) -> list:
    """The quick settings without some of them."""
    pairs = zip(QUICK[::2], QUICK[1::2], strict=True)
    return [word for pair in pairs if pair[0] not in names for word in pair]


def python(block: str, page: str, **names) -> dict:
    exec(compile(block, f"{page}.md", "exec"), names)
    return names


def test_the_first_commands_of_the_guide(here, capsys):
    section = blocks("guide", "bash", "From the command line")
    train, evaluate, predict, info = (shlex.split(line)[1:] for line in section[0].splitlines())
    run(capsys, *train, *QUICK)
    assert "100 examples of held-out.csv" in run(capsys, *evaluate)[0]
    assert json.loads(run(capsys, *predict)[0])["label"] in ("0", "1")
    assert "terrible" in run(capsys, *info)[0]


def test_the_settings_file_of_the_guide(here, capsys):
    (here / "models").mkdir()
    (here / "smollm2").rename(here / "models" / "llama")
    (block,) = blocks("guide", "yaml")
    (here / "run.yaml").write_text(block)
    run(capsys, "train", "--config", "run.yaml", *QUICK)
    settings = json.loads((here / "runs" / "reviews" / "adazeta.json").read_text())["settings"]
    assert settings["template"] == "{text}\nIt was" and settings["max_minutes"] == 10


def test_the_loop_and_the_trainer_of_the_guide(here):
    loop, trainer = blocks("guide", "python", "From Python")
    torch.manual_seed(0)
    batches = [{**lm_batch(4), "labels": torch.tensor([0, 1, 0, 1])} for _ in range(2)]
    tokenizer = AutoTokenizer.from_pretrained(here / "smollm2")
    names = python(loop, "guide", base=tiny_llama(vocab_size=len(tokenizer)), tokenizer=tokenizer, batches=batches)
    assert names["opt"].step_index == 2 and (here / "adapter" / "adapter_model.safetensors").is_file()
    assert trainer.count("max_steps=400") == 1
    rows = [{**row, "labels": index % 2} for index, row in enumerate(dataset(16))]
    given = {name: names[name] for name in ("model", "loss_fn")}
    python(trainer.replace("400", "3"), "guide", **given, train_dataset=rows, collator=default_data_collator)
    assert len(read(here / "out" / "journal.azj").steps) == 3


def test_the_commands_of_calibration(here, capsys):
    calibrate, train = commands("calibration")
    run(capsys, *calibrate, *QUICK, "--batches", 2, "--probed", 8)
    assert {path.name for path in Path("runs/calibration").iterdir()} == {"calibration.json", "calibration.png"}
    run(capsys, *train, *quick_but("--eps", "--lr"))
    settings = json.loads((here / "runs" / "reviews" / "adazeta.json").read_text())["settings"]
    assert all(0 < settings[name] < 1 and settings[name] != 0.01 for name in ("eps", "lr"))


def adapted_optimizer() -> ZerothOrder:
    import peft

    return ZerothOrder(peft.get_peft_model(tiny_llama(), TTConfig(rank=2, bottleneck=8)), eps=1e-2, queries=2)


def test_calibration_in_a_loop_of_ones_own(capsys):
    (block,) = blocks("calibration", "python")
    batches = [lm_batch(4, seed=seed) for seed in range(2)]
    names = python(block, "calibration", opt=adapted_optimizer(), loss_fn=lm_loss, batches=batches)
    assert len(capsys.readouterr().out.split()) == 4 and 0 < names["found"].eps < 1


def test_processes_that_share_the_work_where_there_is_one(here):
    """Under torchrun the same lines share it: test_torchrun.py."""
    block, _ = blocks("many-machines", "python")
    args = TrainingArguments("out", max_steps=2, remove_unused_columns=False, report_to=[])
    model = adapted_optimizer().model
    names = python(block, "many-machines", model=model, args=args, dataset=dataset(8))
    assert names["ranks"] is None and names["trainer"].train_dataset
    names["opt"].estimate(lm_loss, lm_batch(4))
    names["opt"].step()
    names["opt"].journal.close()
    assert len(read(here / "run" / "journal.azj").steps) == 1


def test_batches_that_are_fetched_while_others_run():
    (block,) = blocks("speed-and-memory", "python")
    if not torch.cuda.is_available():
        assert block.count('"cuda"') == 1
        block = block.replace('"cuda"', '"cpu"')
    opt = adapted_optimizer()
    if torch.cuda.is_available():
        opt.model.to("cuda")
    python(block, "speed-and-memory", opt=opt, loss_fn=lm_loss, loader=[lm_batch(4), lm_batch(2)])
    assert opt.step_index == 2


def test_the_plan_of_a_run(here, capsys):
    (plan,) = commands("speed-and-memory")
    out, _ = run(capsys, *plan)
    assert "MiB" in out


def test_the_commands_of_the_journal(here, capsys, monkeypatch):
    """On runs of 120 steps, of which a third was stopped after 100."""
    train = ("train", "--model", "smollm2", "--data", "letters.csv", *SMALL, "--steps", 120, "--save-every", 50)
    run(capsys, *train, "--output", "runs/demo")
    run(capsys, *train, "--output", "runs/other", "--seed", 3)
    on_log = Bar.on_log

    def interrupt(self, args, state, control, logs=None, **kwargs):
        on_log(self, args, state, control, logs=logs, **kwargs)
        if state.global_step == 99 and "loss" in (logs or {}):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Bar, "on_log", interrupt)
    assert main(capsys, *train, "--output", "runs/demo", "--overwrite")[0] == 130
    shutil.copy("runs/demo/journal.azj", "journal.azj")
    for words in commands("journal"):
        code, out, err = main(capsys, *words)
        assert code == (1 if words[:2] == ["journal", "diff"] else 0), (words, err)


def test_the_run_of_the_demo_is_asked(here, capsys):
    run(capsys, "train", "--model", "smollm2", "--data", "letters.csv", "--output", "runs/demo", *QUICK)
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    predict, replay = (
        shlex.split(line, comments=True)[1:] for line in re.findall(r"^\.venv/bin/adazeta .*", readme, re.M)
    )
    assert "positive" in run(capsys, *predict)[0]
    assert "bit for bit" in run(capsys, *replay)[0]


def test_a_private_run(here, capsys):
    pytest.importorskip("dp_accounting", reason="dp-accounting, which counts epsilon, is not installed")
    train, stats = commands("private")
    run(capsys, *train, *quick_but("--batch-size"))
    assert "epsilon" in run(capsys, *stats)[0]
