"""Model cards tell what a run did, without paths of this machine; pushing to the hub uses them. No network."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from huggingface_hub import ModelCard
from peft import PeftModel
from tiny import lm_batch, tiny_adapted, tiny_llama
from transformers import TrainingArguments

from adazeta import ZerothOrder, ZOConfig, ZOTrainer
from adazeta.losses import lm_loss
from adazeta.model_card import REPLAY, describe_run, hub_name, model_card, push_run
from adazeta.replay import replay


class FakeHub:
    """Records what an ``HfApi`` is asked for, and keeps the uploaded files."""

    def __init__(self):
        self.calls, self.files = [], {}

    def create_repo(self, name, **settings):
        self.calls.append(("create_repo", name, settings))
        return SimpleNamespace(repo_id=f"me/{name.split('/')[-1]}")

    def upload_folder(self, *, repo_id, folder_path, **settings):
        from pathlib import Path

        self.calls.append(("upload_folder", repo_id, settings))
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()}
        return "done"


def test_the_card_of_a_run(world):
    folder, _ = world
    text = (folder / "run" / "README.md").read_text()
    assert str(folder) not in text
    summary = json.loads((folder / "run" / "summary.json").read_text())
    data = ModelCard.load(folder / "run" / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("peft", "text-classification", None)
    assert {"adazeta", "zeroth-order", "tensor-train"} <= set(data.tags)
    assert sorted(data.metrics) == ["accuracy", "loss"]
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values == {name: round(value, 4) for name, value in summary["dev"]["after"].items()}
    assert {(r.dataset_name, r.dataset_split) for r in data.eval_results} == {("data.jsonl", "dev")}
    for expected in (
        "54 train, 6 dev examples",
        "seed",
        "Review: {text}",
        "`positive` as ` positive`",
        "LlamaForCausalLM",
    ):
        assert expected in text, expected
    assert f"{summary['training']['rows']:,}" in text
    assert summary["digests"]["adapter_sha256"] in text


def test_the_card_of_the_demo_names_what_the_hub_has():
    about = {"name": "demo", "base_model": "smollm2", "data": "movies", "task": {"kind": "completion"}}
    about["measured"] = {"test": {"before": {"f1": 0.25}, "after": {"f1": 0.75}}}
    card = model_card(about)
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "base_model:adapter:HuggingFaceTB/SmolLM2-135M-Instruct" in card.data.tags
    assert card.data.pipeline_tag == "text-generation"
    assert "Hutto" in card.content and "| test | f1 | 0.2500 | 0.7500 |" in card.content
    assert "A LORA adapter" in model_card({"name": "x", "base_model": "a/b", "method": "LORA"}).content
    assert model_card({"name": "x", "base_model": "a/b", "data": "hub:org/set:small@main"}).data.datasets == ["org/set"]


def test_names_of_base_models(tmp_path):
    cached = tmp_path / "models--org--name" / "snapshots" / "0123"
    assert hub_name(cached) == hub_name("org/name") == "org/name"
    (tmp_path / "config.json").write_text('{"_name_or_path": "org/other"}')
    assert hub_name(tmp_path) == "org/other"
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": str(tmp_path / "gone")}))
    assert hub_name(tmp_path) is None


def test_pushing_a_run_leaves_the_paths_out(world, tmp_path):
    folder, _ = world
    hub, notes = FakeHub(), []
    assert push_run(folder / "run", "me/adapter", private=True, api=hub, say=notes.append) == "done"
    assert [call[:2] for call in hub.calls] == [("create_repo", "me/adapter"), ("upload_folder", "me/adapter")]
    assert hub.calls[0][2]["private"] is True
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json", "metrics.jsonl"} <= set(hub.files)
    assert not [name for name, content in hub.files.items() if str(folder).encode() in content]
    assert "journal.azj" not in hub.files and "names the folder" in notes[0]
    card = (folder / "run" / "README.md").read_text()
    assert card.endswith("\n\n" + REPLAY + "\n")  # of the journal, which stays behind
    assert hub.files["README.md"].decode() == card.removesuffix("\n\n" + REPLAY + "\n") + "\n"
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "base"
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    from transformers import LlamaForCausalLM

    base = [LlamaForCausalLM.from_pretrained(folder / "base") for _ in range(2)]
    ids = torch.arange(3, 11)[None]
    ours, theirs = (PeftModel.from_pretrained(*pair)(ids).logits for pair in zip(base, (folder / "run", tmp_path)))
    assert torch.equal(ours, theirs)


def test_no_path_of_data_or_objective_gets_out(world, tmp_path):
    """Neither as it was typed, nor from the home folder, nor from the folder of the command."""
    run, summary = tmp_path / "run", json.loads((world[0] / "run" / "summary.json").read_text())
    shutil.copytree(world[0] / "run", run)
    card = json.loads((run / "adazeta.json").read_text())
    for objective, data in (("/home/me/score.py:f", "~/me/rows.csv"), ("me/score.py:f", "../me/rows.csv")):
        card["settings"] |= {"objective": objective, "data": data, "dev_data": "hub:org/me@main"}
        (run / "adazeta.json").write_text(json.dumps(card))
        about = describe_run(card, {**summary, "objective": "score.py:f"}, "run", tiny_adapted())
        text = model_card(about).content
        assert "/score.py" not in text and "score.py:f" in text
        assert "me/rows" not in text and "rows.csv" in text
        push_run(run, "me/adapter", api=(hub := FakeHub()))
        pushed = json.loads(hub.files["adazeta.json"])["settings"]
        named = {"objective": "score.py:f", "data": "rows.csv", "dev_data": "hub:org/me@main"}
        assert {key: pushed[key] for key in named} == named


def test_a_journal_is_pushed_with_the_numbers_it_begins_with(world, tmp_path):
    run, model = tmp_path / "run", tiny_adapted(noise=0.2)
    shutil.copytree(world[0] / "run", run)
    opt = ZerothOrder(model, queries=2, lr=0.1)
    opt.write_journal(run / "journal.azj")
    opt.estimate(lm_loss, lm_batch(2))
    opt.step()
    opt.journal.close()
    push_run(run, "me/adapter", api=(hub := FakeHub()))
    for name in ("journal.azj", *(name for name in hub.files if name.startswith("journal-initial-"))):
        (tmp_path / name).write_bytes(hub.files[name])
    assert torch.equal(replay(tmp_path).trainable.tensors[0], model.base_model.theta())
    assert REPLAY in hub.files["README.md"].decode()


def test_the_trainer_pushes_its_own_card(tmp_path, monkeypatch):
    hub = FakeHub()
    if not hasattr(transformers.trainer, "hf_api"):
        pytest.skip("this transformers pushes by functions, not by an HfApi")
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    rows = [{name: value[i] for name, value in lm_batch(4).items()} for i in range(4)]
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "hub_model_id": "me/tuned"}
    steps = {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    args = TrainingArguments(str(tmp_path / "out"), report_to="none", **steps, **evaluation)
    model = tiny_adapted()
    model.config._name_or_path = str(tmp_path / "secret" / "model")
    trainer = ZOTrainer(model=model, args=args, zo=ZOConfig(eps=1e-2), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    assert [call[:2] for call in hub.calls] == [("create_repo", "me/tuned"), ("upload_folder", "me/tuned")]
    text = hub.files["README.md"].decode()
    assert str(tmp_path) not in text and "`model`" in text
    data = ModelCard(text).data
    assert (data.model_name, data.library_name) == ("tuned", "peft")
    assert data.eval_results[0].metric_value == round(trainer.state.log_history[-2]["eval_loss"], 4)
    assert "4 train, 4 dev examples" in text
    trainer.save_model(str(tmp_path / "adapter"))
    assert str(tmp_path) not in (tmp_path / "adapter" / "README.md").read_text()
    shutil.rmtree(tmp_path / "out")
    assert PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")


def test_a_model_without_adapters_has_the_trainers_own_card(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none")
    rows = [{name: value[0] for name, value in lm_batch(1).items()}]
    trainer = ZOTrainer(model=tiny_llama(layers=1), args=args, zo=ZOConfig(eps=1e-2), train_dataset=rows)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert "generated_from_trainer" in (tmp_path / "README.md").read_text()
