"""Exports give the outputs of the adapted model: factors by the kernels' ops, LoRA and merged models by stock PEFT."""

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from families import adapted, batch_for, build
from peft import PeftModel
from safetensors import safe_open
from tiny_run import fails, main, write_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from adazeta.errors import UserError
from adazeta.export import _outputs, export, factors_of, linear_update, read_low_rank
from adazeta.runs import Classifier
from adazeta.tasks import HeadTask, LabelWordTask, to_dict
from adazeta_kernels import tt_linear

AUTO = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}
WORDS = {"a": " positive", "b": " negative"}


def write_run(folder, model_type, **config):
    """Write a base model and a run with random adapters on it; return the adapted model and the run's folder."""
    settings = {"act": "identity", "noise": 0.3, "task_type": None, **config}
    model = adapted(model_type, **settings)
    write_model(folder / "base")  # its tokenizer
    (folder / "base" / "model.safetensors").unlink()
    base = folder / "base"
    model.save_pretrained(folder / "run")
    build(model_type, config.get("auto")).save_pretrained(base)
    card = {"base_model": str(base), "task": to_dict(LabelWordTask(label_words=WORDS)), "dtype": "float32"}
    (folder / "run" / "adazeta.json").write_text(json.dumps(card))
    return model, folder / "run"


def outputs(model, batch):
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch["labels"].clamp_min(0)
    with torch.no_grad():
        return model(**inputs).logits


def same(found, wanted, base, batch):
    """``found`` gives the outputs of ``wanted``, which are not those of ``base``."""
    found, wanted, plain = (outputs(model, batch) for model in (found, wanted, base))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - plain).abs().max() > 0.01


def base_of(folder, model_type="llama"):
    return AUTO.get(model_type, AutoModelForCausalLM).from_pretrained(folder / "base").eval()


CASES = {
    "llama": ("llama", {"bias": False}),
    "llama, biases": ("llama", {}),
    "llama, before the module": ("llama", {"sites": ["pre:up_proj", "post:o_proj"], "scale": 0.5}),
    "gpt2": ("gpt2", {}),
    "gpt2, before the module": ("gpt2", {"sites": "published"}),
    "bert": ("bert", {}),
    "t5": ("t5", {"bias": False}),
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("case", CASES)
def test_a_lora_is_the_adapter(tmp_path, case):
    model_type, config = CASES[case]
    model, run = write_run(tmp_path, model_type, **config)
    notes = []
    export(run, tmp_path / "lora", "lora", say=notes.append)
    lora = PeftModel.from_pretrained(base_of(tmp_path, model_type), tmp_path / "lora").eval()
    same(lora, model, base_of(tmp_path, model_type), batch_for(model, 3, 7))
    settings = lora.peft_config["default"]
    assert settings.r == settings.lora_alpha == 2
    assert settings.lora_bias == ("bias" not in config)
    assert "largest difference" in notes[-1]
    assert not (tmp_path / "lora" / "README.md").exists()  # PEFT's, with the path of the base model
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora", "run"]


@pytest.mark.parametrize("model_type, config", [("llama", {"bias": False}), ("gpt2", {}), ("bert", {})])
def test_a_merged_model_needs_no_adapter(tmp_path, model_type, config):
    model, run = write_run(tmp_path, model_type, **config)
    auto, batch = AUTO.get(model_type, AutoModelForCausalLM), batch_for(model, 3, 7)
    export(run, tmp_path / "merged", "merged", say=print)
    base, merged = base_of(tmp_path, model_type), auto.from_pretrained(tmp_path / "merged").eval()
    same(merged, model, base, batch)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in base.named_parameters()]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode(" positive")
    assert str(tmp_path) not in (tmp_path / "merged" / "config.json").read_text()
    notes = []
    export(run, tmp_path / "merged", "merged", dtype="bfloat16", overwrite=True, say=notes.append)
    rounded = auto.from_pretrained(tmp_path / "merged").eval()
    assert rounded.dtype == torch.bfloat16
    said = float(re.search(r"random tokens: (\S+) ", notes[-1])[1])
    assert said == pytest.approx(float((_outputs(rounded) - _outputs(model)).abs().max()), rel=0.06) and said > 1e-3
    assert all((p - q).abs().max() <= 0.004 * q.abs().max() for p, q in zip(rounded.parameters(), merged.parameters()))


@pytest.mark.parametrize(
    "config", [{"act": "gelu"}, {"act": "tanh", "sites": "published", "bias": False, "scale": 0.5}]
)
def test_factors_reproduce_each_adapter(tmp_path, config):
    model, run = write_run(tmp_path, "llama", positions="all", **config)
    export(run, tmp_path / "factors", "low-rank")
    layers = dict(model.base_model.tt_layers("default"))
    sites = read_low_rank(tmp_path / "factors")
    assert [site.module for site in sites] == list(layers)
    for site in sites:

        def probe(value):
            return None if value is None else value[None]

        x = torch.randn(1, 15, len(site.L1), generator=torch.Generator().manual_seed(0))
        h = getattr(torch.nn.functional, site.act)(tt_linear(x, *map(probe, (site.L1, site.R1, site.b1))))
        y = x + site.scale * tt_linear(h, *map(probe, (site.L2, site.R2, site.b2)))
        with torch.no_grad():
            wanted = layers[site.module]._adapt(x, "default")
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
        assert (wanted - x).abs().max() > 1e-3
        assert site.placement == layers[site.module].placement["default"]
    card = json.loads((tmp_path / "factors" / "low_rank.json").read_text())
    assert str(tmp_path) not in json.dumps(card)
    with safe_open(tmp_path / "factors" / "low_rank.safetensors", framework="pt") as stored:
        shapes = {f"{site['module']}.{part}": shape for site in card["sites"] for part, shape in site["shapes"].items()}
        assert {name: stored.get_slice(name).get_shape() for name in stored.keys()} == shapes  # noqa: SIM118


def test_a_head_that_was_trained_along_is_exported(tmp_path):
    model, run = write_run(tmp_path, "bert", auto=AutoModelForSequenceClassification, modules_to_save=["classifier"])
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1.0)
    model.save_pretrained(run)
    card = json.loads((run / "adazeta.json").read_text())
    card["task"] = to_dict(HeadTask(("a", "b")))
    (run / "adazeta.json").write_text(json.dumps(card))
    batch = batch_for(adapted("bert"), 2, 7)
    for to in ("lora", "merged", "low-rank"):
        export(run, tmp_path / to, to, say=print)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    same(merged, model, base, batch)
    assert (merged.config.id2label, merged.config.label2id) == ({0: "a", 1: "b"}, {"a": 0, "b": 1})
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    same(PeftModel.from_pretrained(base, tmp_path / "lora").eval(), model, plain, batch)
    assert json.loads((tmp_path / "low-rank" / "low_rank.json").read_text())["whole_modules"] == [
        "classifier.bias",
        "classifier.weight",
    ]


@pytest.mark.parametrize(
    "model_type, config, to, reason",
    [
        ("llama", {"act": "gelu"}, "lora", "has the activation gelu"),
        ("llama", {"positions": "last"}, "merged", "last token of a prompt alone"),
        ("llama", {}, "merged", "o_proj adds a bias, and this layer has none .*--no-bias"),
        ("mixtral", {"bias": False}, "lora", "mlp stands at a MixtralSparseMoeBlock"),
        ("gpt2", {"sites": ["pre:lm_head"], "bias": False}, "merged", "weight of lm_head is used elsewhere"),
    ],
)
def test_what_has_no_such_form_is_refused_with_the_reason(tmp_path, model_type, config, to, reason):
    _, run = write_run(tmp_path, model_type, **config)
    with pytest.raises(UserError, match=reason):
        export(run, tmp_path / "out", to, say=print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_a_quantised_layer_is_no_linear_layer_of_plain_numbers():
    """torchao leaves a layer's class as it is: the weight tells. test_quantized.py has a real one."""

    class Packed(torch.Tensor):
        __module__ = "torchao.quantization"

    factors = factors_of(adapted("llama", act="identity", positions="all", task_type=None))[0]
    layer = torch.nn.Linear(len(factors.L1), len(factors.L1))
    assert linear_update(factors, layer).A.shape == (2, len(factors.L1))
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Packed))
    with pytest.raises(UserError, match="stands at a Packed, not at a linear layer of plain numbers.*--quantize"):
        linear_update(factors, layer)


def test_the_command(world, capsys, tmp_path):
    folder, _ = world
    code, out, _ = main(capsys, "export", folder / "run", "--to", "low-rank", "--output", tmp_path / "factors")
    assert (code, len(read_low_rank(tmp_path / "factors"))) == (0, 1)
    assert "read_low_rank" in out
    assert "last token" in fails(capsys, "export", folder / "run", "--to", "lora", "--output", tmp_path / "lora")
    again = ("export", folder / "run", "--to", "low-rank", "--output")
    assert "--overwrite" in fails(capsys, *again, tmp_path / "factors")
    assert main(capsys, *again, tmp_path / "factors", "--overwrite")[0] == 0
    assert "not an earlier export" in fails(capsys, *again, folder / "run", "--overwrite")
    assert "not a run folder" in fails(capsys, "export", folder / "base", "--to", "lora", "--output", tmp_path / "lora")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["factors"]


def test_only_an_earlier_export_is_replaced(tmp_path):
    """Neither a base model nor an adapter of another origin, which have the files of a merged model and of a LoRA."""
    _, run = write_run(tmp_path, "llama", bias=False)
    adapted("llama").save_pretrained(tmp_path / "adapter")
    before = {path: path.read_bytes() for name in ("base", "adapter") for path in (tmp_path / name).iterdir()}
    for name in ("base", "adapter"):
        for to in ("low-rank", "lora", "merged"):
            with pytest.raises(UserError, match="not an earlier export"):
                export(run, tmp_path / name, to, overwrite=True, say=print)
    assert {path: path.read_bytes() for name in ("base", "adapter") for path in (tmp_path / name).iterdir()} == before
    for to in ("low-rank", "lora", "merged"):
        export(run, tmp_path / "out", to, overwrite=True, say=print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out", "run"]


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_the_guide_looks_and_exports(world, capsys, monkeypatch, tmp_path):
    guide = (Path(__file__).resolve().parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    section = guide.split("\n## Looking, exporting\n")[1].split("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    for name in ("reviews", "other"):
        shutil.copytree(world[0] / "run", tmp_path / "runs" / name)
    write_run(tmp_path, "llama", bias=False)[1].rename(tmp_path / "runs" / "linear")
    (tmp_path / "new.csv").write_text("text,id\na warm film,1\na dull one,2\n")
    for line in re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].splitlines():
        before, pipe, command = line.partition("| ")
        monkeypatch.setattr("sys.stdin", io.StringIO("a warm film\na dull one\n" if pipe else ""))
        program, *arguments = shlex.split(command if pipe else before, comments=True)
        code, out, err = main(capsys, *arguments)
        assert (program, code) == ("adazeta", 0), err
        assert not pipe or [json.loads(answer)["text"] for answer in out.splitlines()] == ["a warm film", "a dull one"]
    made = {path.name for path in tmp_path.iterdir()}
    assert made >= {"curves.png", "curves.html", "answered.csv", "factors", "lora", "merged"}
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    names = {"x": torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))}
    exec(compile(example, "guide.md", "exec"), names)
    classifier = Classifier.open(str(tmp_path / "runs" / "reviews"))
    (layer,) = (layer for _, layer in classifier.model.base_model.tt_layers("default"))
    assert layer.act["default"] == "identity"  # the default preset's
    with torch.no_grad():
        torch.testing.assert_close(names["y"], layer._adapt_rows(names["x"], "default"))
