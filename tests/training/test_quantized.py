"""Quantised and low-memory bases as `transformers` loads them; a cell that cannot run here is skipped, and says why."""

import sys
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace

import peft
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from test_gguf import write_gguf
from test_trainer import trainer
from tiny import lm_batch
from tiny_run import main, train_command, write_data, write_model
from transformers import AutoModelForCausalLM

from adazeta import TTConfig, UserError, ZerothOrder
from adazeta.base_models import load_base
from adazeta.digests import base_sha256
from adazeta.export import factors_of, linear_update
from adazeta.frozen import mix, pack
from adazeta.journal import NAME
from adazeta.losses import lm_loss
from adazeta.planner import Planner
from adazeta.probes import Plan, evaluate_probes
from adazeta.quantized import METHODS, all_finite, quantization_config
from adazeta.replay import replay
from adazeta.tasks import HeadTask


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("quantized") / "base", intermediate_size=128)


def load(base, method, dtype=torch.float32, **keywords):
    """The base model of a cell of the table, or a skip with its reason."""
    if method in METHODS:
        if find_spec(METHODS[method]) is None:
            pytest.skip(f"{method}: the package {METHODS[method]} is not installed")
        if method == "int4" and Version(version("torchao")) < Version("0.18"):
            pytest.skip(
                f"{method}: torchao {version('torchao')} packs 4 bits for GPUs and XPUs only, 0.18 for CPUs too"
            )
        keywords["quantization_config"] = quantization_config(method)
    elif method == "gguf":
        write_gguf(base, base.parent / "tiny.gguf")  # of which transformers makes plain weights as it reads
        base, keywords["gguf_file"] = base.parent, "tiny.gguf"
    elif method == "devices" and torch.cuda.device_count() < 1:
        pytest.skip("device_map over a GPU and the CPU: torch finds no GPU")
    elif method == "devices":
        keywords["device_map"] = {**placed("cuda:0"), "model.layers.1": "cpu"}
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **keywords).requires_grad_(False).eval()


def placed(device):
    names = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    return {name: device for name in names}


CONFIGS = ("Float8WeightOnlyConfig", "Int8WeightOnlyConfig")
CELLS = [*METHODS, "gguf", "devices", "disk"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", CELLS)
def test_an_adapter_trains_on_it(base, tmp_path, method, dtype):
    """Identity at the start, batched as one by one, weights untouched, and a journal that makes the adapter again."""
    offload = {"device_map": {**placed("cpu"), "model.layers.1": "disk"}, "offload_folder": tmp_path / "offload"}
    model = load(base, method, dtype, **(offload if method == "disk" else {}))
    batch = lm_batch(4)
    with torch.no_grad():
        plain = lm_loss(model, batch)
    if method in METHODS:
        quantised = sum(type(m._parameters.get("weight")) is not torch.nn.Parameter for m in linears(model))
        assert quantised == 14 and all(all_finite(p) for p in model.parameters())
        assert mix(model) == 0 == pack(model, 16)
    model = peft.get_peft_model(model, TTConfig(rank=2, bottleneck=8)).eval()
    with torch.no_grad():
        assert torch.equal(lm_loss(model, batch), plain)
    before = base_sha256(model)
    model.base_model.theta().add_(0.1)
    plan = Plan([1, 2], 0.2, (1.0, -1.0), 1, 4)
    together, alone = (
        evaluate_probes(
            plan,
            batch,
            lambda part: lm_loss(model, part),
            tt_model=model.base_model,
            planner=Planner(probes_per_forward=limit),
        )
        for limit in (4, 1)
    )
    torch.testing.assert_close(together, alone, atol=5e-6 if dtype == torch.float32 else 0.05, rtol=0)
    assert together.std(1).max() > 1e-3
    opt = ZerothOrder(model, lr=0.01, eps=0.05, queries=2)
    opt.write_journal(tmp_path / NAME)
    for _ in range(2):
        opt.estimate(lm_loss, batch)
        opt.step()
    opt.journal.close()
    assert torch.equal(replay(tmp_path).trainable.tensors[0], model.base_model.theta().cpu())
    assert base_sha256(model) == before


@pytest.mark.parametrize("method", ["int8", "int4", "bnb4"])
def test_it_takes_no_lora(base, method):
    config = TTConfig(rank=2, bottleneck=8, act="identity", positions="all")
    model = peft.get_peft_model(load(base, method), config)
    layers = dict(model.base_model.tt_layers("default"))
    for factors in factors_of(model):
        with pytest.raises(UserError, match="not at a linear layer of plain numbers"):
            linear_update(factors, layers[factors.module].base_layer)


def linears(model):
    return [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]


@pytest.mark.parametrize("method", ["int8", "bnb4"])
def test_train_and_predict_from_the_command_line(base, tmp_path, capsys, method):
    """With --quantize, and from a folder that was saved quantised, to the same bits."""
    model = load(base, method)
    world = tmp_path / "world"
    world.mkdir()
    (world / "base").symlink_to(base)
    write_data(world / "data.jsonl")
    small = ("--steps", 2, "--positions", "all", "--queries", 2)
    code, _, err = main(capsys, *train_command(world, "run", "--quantize", method, *small))
    assert code == 0, err
    code, out, err = main(capsys, "predict", world / "run", "a warm film", "--json", "--threads", 1)
    assert code == 0 and '"label"' in out, err
    (world / "base").unlink()
    model.save_pretrained(world / "base")
    load_base(str(base))[1].save_pretrained(world / "base")
    code, _, err = main(capsys, *train_command(world, "again", *small))
    assert code == 0, err
    first, second = (load_file(world / name / "adapter_model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("method", ["gguf", "int4"])
def test_the_trainer_takes_what_lets_no_gradient_through(base, tmp_path, method):
    """transformers' own refuses them, as it does a model that is quantised and has no adapter."""
    model = load(base, method)
    assert not model.hf_quantizer.is_trainable
    run = trainer(tmp_path, max_steps=2, model=peft.get_peft_model(model, TTConfig(rank=2, bottleneck=8)).eval())
    run.train()
    assert torch.equal(replay(tmp_path).trainable.tensors[0], run.model.base_model.theta().cpu())
    assert not vars(model).get("_hf_peft_config_loaded") and not vars(run.model).get("_hf_peft_config_loaded")


def test_a_product_that_this_cpu_lacks_is_told(tmp_path):
    folder = write_model(tmp_path / "base", intermediate_size=96)
    model = load(folder, "bnb4")
    if not next(m for m in linears(model) if hasattr(m, "support_avx512bf16_for_cpu")).support_avx512bf16_for_cpu:
        pytest.skip("bnb4: this CPU has no products of bfloat16, without which bitsandbytes takes any width")
    with pytest.raises(UserError, match=r"rows of a multiple of 64 on this CPU, .*down_proj reads 96; try int8"):
        load_base(str(folder), quantize="bnb4", device="cpu")


@pytest.mark.parametrize("method", ["int4", "fp8"])
def test_weights_that_do_not_fit_are_told(tmp_path, method):
    folder, said = write_model(tmp_path / "base", intermediate_size=80), []  # down_proj reads no multiple of 32
    load(folder, method)  # or a skip
    for head in (None, HeadTask(["0", "1"]), HeadTask(["0", "1"], pooling="mean")):
        load_base(str(folder), quantize=method, device="cpu", task=head, say=said.append)
    load_base(str(folder), quantize=method, device="cpu", dtype="bfloat16", say=said.append)
    slow = "--quantize int4: CPUs multiply 4 bits slowly in float32, --dtype bfloat16 is some ten times faster"
    told = [f"--quantize {method}: 2 of 14 linear layers stay plain, their width does not fit"]
    assert said == ([*3 * [slow, *told], *told] if method == "int4" else [])


def test_what_is_missing_is_told(base, monkeypatch):
    monkeypatch.setattr("adazeta.quantized.find_spec", lambda package: None)
    with pytest.raises(UserError, match="bnb8 needs a package that is not installed: pip install bitsandbytes"):
        load_base(str(base), quantize="bnb8")
    monkeypatch.setattr("adazeta.quantized.find_spec", lambda package: None if package == "mslk" else package)
    monkeypatch.setitem(sys.modules, "torchao.quantization", SimpleNamespace(**dict.fromkeys(CONFIGS)))
    with pytest.raises(UserError, match="int4 on a GPU needs torchao's kernels, which are not installed: mslk >= 1.0"):
        quantization_config("int4", "cuda")
    with pytest.raises(UserError, match="expected one of int8, .*got 'int3'"):
        load_base(str(base), quantize="int3")
