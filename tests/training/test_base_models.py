"""Base models are loaded whole or not at all, but for a new head and what it reads through, which train."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, SEQ2SEQ, build
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_run import fails, main, write_data, write_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adazeta.base_models import load_base
from adazeta.errors import UserError
from adazeta.runs import Classifier
from adazeta.tasks import HeadTask

HEAD = HeadTask(("bad", "fair", "good"))
UPPER = r"\b(layers?|h|blocks)\.1\."  # in names of the second of two blocks


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The folder of a tiny Llama, and its tokenizer."""
    folder = write_model(tmp_path_factory.mktemp("tokenizer") / "base")
    return folder, AutoTokenizer.from_pretrained(folder)


def check_pooled(folder):
    """A head on a mean alone trains, and ``depth`` leaves the upper blocks out and the others as they are."""
    mean = load_base(folder, task=HeadTask(HEAD.labels, pooling="mean"))[0]
    assert {name for name, p in mean.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}
    one = load_base(folder, task=HeadTask(HEAD.labels, pooling="mean", depth=1))[0]
    stay = {name: p for name, p in mean.encoder.named_parameters() if re.search(UPPER, name) is None}
    found = dict(one.encoder.named_parameters())
    assert len(stay) < len(dict(mean.encoder.named_parameters())) and stay.keys() == found.keys()
    assert all(torch.equal(p, found[name]) for name, p in stay.items())


NO_HEAD = ("apertus", "codegen", "cohere", "cohere2", "granite", "lfm2", "olmoe")  # in transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_whole(tokenizer, tmp_path, family):
    """As a language model, with a new head, with that of more classes, and without the models' own head."""
    tokenizer[1].save_pretrained(tmp_path)
    saved = build(family)
    saved.save_pretrained(tmp_path)
    loaded = load_base(str(tmp_path))[0].state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in saved.state_dict().items())
    if family in SEQ2SEQ:
        with pytest.raises(UserError, match="--pooling mean: .* is an encoder-decoder"):
            load_base(str(tmp_path), task=HeadTask(HEAD.labels, pooling="mean"))
    else:
        check_pooled(str(tmp_path))
    if family in NO_HEAD:
        with pytest.raises(UserError, match="no classification head for its model type; use --pooling attention"):
            load_base(str(tmp_path), task=HEAD)
        return
    new, _ = load_base(str(tmp_path), task=HEAD)
    poolers = {name for name, p in new.named_parameters() if p.requires_grad and ".pooler." in name}
    assert len(poolers) == (2 if family in ("bert", "ernie", "megatron-bert") else 0)
    build(family, AutoModelForSequenceClassification, num_labels=5).save_pretrained(tmp_path)
    other, _ = load_base(str(tmp_path), task=HEAD)
    assert other.config.id2label == dict(enumerate(HEAD.labels))
    assert not any(p.requires_grad for name, p in other.named_parameters() if ".pooler." in name)


def change(folder, changed):
    """Write a copy of a model whose tensors are ``changed(name, tensor)``, pairs of a name and a tensor."""
    weights = folder / "model.safetensors"
    tensors = dict(changed(name, tensor) for name, tensor in load_file(weights).items())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})


@pytest.mark.parametrize("task", [None, HEAD], ids=["language model", "head"])
@pytest.mark.parametrize(
    "changed, message",
    [
        (
            lambda name, tensor: (name.replace("layers.1", "other.1"), tensor),
            r"9 of its weights do not agree \(model.layers.1.input_layernorm.weight is missing; .*; \.\.\.\): get the",
        ),
        (
            lambda name, tensor: (name, tensor[:, :9] if name.endswith("1.mlp.up_proj.weight") else tensor),
            r"1 of its weights do not agree \(model.layers.1.mlp.up_proj.weight is \[96, 9\], expected \[96, 64\]\)",
        ),
    ],
    ids=["names", "shape"],
)
def test_a_checkpoint_of_other_weights_is_refused(tokenizer, tmp_path, task, changed, message):
    folder = Path(shutil.copytree(tokenizer[0], tmp_path / "base"))
    change(folder, changed)
    with pytest.raises(UserError, match=message) as error:
        load_base(str(folder), task=task)
    assert str(error.value).startswith(f"{folder}: config.json and ") and "\n" not in str(error.value)


def test_damaged_weights_are_told_before_anything_is_written(tokenizer, tmp_path, capsys):
    folder = Path(shutil.copytree(tokenizer[0], tmp_path / "base"))
    data = write_data(tmp_path / "data.jsonl")
    change(folder, lambda name, tensor: (name.replace("layers.1", "other.1"), tensor))
    assert "do not agree" in fails(capsys, "eval", folder, "--data", data)
    assert "do not agree" in fails(capsys, "train", "--model", folder, "--data", data, "--output", tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "data.jsonl"]


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("family, layer", [("bert", "bert.pooler.dense"), ("roberta", "classifier.dense")])
def test_all_that_a_checkpoint_lacks_trains_and_is_saved(tokenizer, tmp_path, capsys, family, layer):
    """So that the run, the model card's lines, a LoRA and a merged model answer alike."""
    build(family, vocab_size=len(tokenizer[1]), max_position_embeddings=64).save_pretrained(tmp_path / "base")
    tokenizer[1].save_pretrained(tmp_path / "base")
    data = ("--model", tmp_path / "base", "--data", write_data(tmp_path / "data.jsonl"), "--output", tmp_path / "run")
    steps = ("--steps", 3, "--batch-size", 8, "--queries", 2, "--lr", 0.05, "--eps", 0.03, "--threads", 1)
    adapter = ("--rank", 2, "--bottleneck", 8, "--layers", 1, "--act", "identity", "--dtype", "float32")
    code, _, err = main(capsys, "train", "--task", "head", *data, *steps, *adapter)
    assert code == 0 and "run once per probe" not in err, err
    run = Classifier.open(str(tmp_path / "run")).model
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert saved[f"base_model.model.{layer}.weight"].shape == (32, 32)
    for to in ("lora", "merged"):
        code, _, err = main(capsys, "export", tmp_path / "run", "--to", to, "--output", tmp_path / to)
        assert code == 0, err

    def base(folder="base"):
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / folder, num_labels=2).eval()

    others = [PeftModel.from_pretrained(base(), tmp_path / name).eval() for name in ("run", "lora")] + [base("merged")]
    ids = torch.randint(3, 200, (6, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, *found = [model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for model in (run, *others)]
    for logits in found:
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)
    assert wanted.std(0).min() > 1e-3
