"""Frozen linear layers in bfloat16 under float32 activations."""

import copy
import json

import pytest
import torch
from tiny_run import main, write_data, write_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from adazeta import frozen
from adazeta.digests import base_sha256

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def models():
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64))
    opt = OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64))
    return {"llama": llama, "opt": opt}  # without and with biases


@pytest.mark.parametrize("name", ["llama", "opt"])
@torch.no_grad()
def test_close_to_float32_and_half_the_memory(name):
    model = models()[name].requires_grad_(False).eval()
    ids = torch.arange(30).reshape(2, 15)
    expected = model(ids).logits
    mixed = copy.deepcopy(model)
    linears = [m for m in model.modules() if type(m) is nn.Linear and m is not model.get_output_embeddings()]
    assert frozen.mix(mixed) == len(linears) > 0
    assert all(m.weight.dtype == torch.bfloat16 for m in mixed.modules() if isinstance(m, frozen.MixedLinear))
    others = {n: p.dtype for n, p in mixed.named_parameters() if not (n.endswith("weight") and p.dim() == 2)}
    assert set(others.values()) == {torch.float32}
    result = mixed(ids).logits
    assert result.dtype == torch.float32
    error = (result - expected).norm() / expected.norm()
    assert 0 < error < 2**-7  # a product errs by 2^-9 of its size
    bytes_of = [sum(p.numel() * p.element_size() for p in m.parameters()) for m in (model, mixed)]
    assert bytes_of[0] - bytes_of[1] == sum(2 * m.weight.numel() for m in linears)


@pytest.mark.parametrize("dtype", ["float32", "mixed", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "opt"])
@torch.no_grad()
def test_packed_layers_multiply_as_plain_ones(name, dtype):
    model = models()[name].requires_grad_(False).eval()
    model = model.bfloat16() if dtype == "bfloat16" else model
    if dtype == "mixed":
        frozen.mix(model)
    ids = torch.arange(30).reshape(2, 15)
    expected, weights = model(ids).logits, {n: p.clone() for n, p in model.named_parameters()}
    packed = copy.deepcopy(model)
    count = frozen.pack(packed, tokens=30)
    layers = {n: m for n, m in packed.named_modules() if isinstance(m, frozen.PackedLinear)}
    assert count == len(layers) == len(weights) - len(dict(packed.named_parameters())) > 0
    assert all(torch.equal(layer.weight, weights[f"{n}.weight"]) for n, layer in layers.items())
    for again in (packed, copy.deepcopy(packed)):
        error = (again(ids).logits - expected).float().norm() / expected.float().norm()
        assert error < (1e-6 if dtype == "float32" else 2**-7)


def test_packed_layers_let_gradients_pass_and_unpack_when_moved():
    layer = nn.Linear(6, 5).requires_grad_(False)
    model = nn.Sequential(copy.deepcopy(layer))
    frozen.pack(model, tokens=4)
    x = torch.randn(3, 6, requires_grad=True)
    model(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(3, 6), atol=1e-6)
    model.to("cpu", torch.float32)
    assert isinstance(model[0], frozen.PackedLinear)
    model.double()
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, layer.weight.double())


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_digest_covers_packed_weights_as_plain_ones(name):
    plain = models()[name].requires_grad_(False)
    mixed = copy.deepcopy(plain)
    frozen.mix(mixed)
    digest = base_sha256(plain)
    for model in (plain, mixed):
        packed = copy.deepcopy(model)
        assert frozen.pack(packed, tokens=8) and base_sha256(packed) == digest
        layer = next(m for m in packed.modules() if isinstance(m, frozen.PackedLinear))
        frozen.unpack(layer)
        assert base_sha256(packed) == digest
        layer.weight[3, 4] += 1
        assert frozen.pack(packed, tokens=8) == 1 and base_sha256(packed) != digest


@pytest.mark.parametrize("change", [frozen.mix, lambda model: frozen.pack(model, tokens=8)])
def test_layers_that_train_stay(change):
    model = models()["llama"].requires_grad_(False)
    trained = model.model.layers[0].mlp.up_proj.requires_grad_(True)
    change(model)
    assert type(trained) is nn.Linear and trained.weight.dtype == torch.float32
    assert isinstance(model.model.layers[1].mlp.up_proj, (frozen.MixedLinear, frozen.PackedLinear))
    assert type(model.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize(("speedup", "expected"), [(1.3, "packed"), (1.01, "plain"), (0.8, "plain")])
def test_packs_where_it_pays_and_says_so(monkeypatch, speedup, expected):
    monkeypatch.setattr(frozen, "packing_speedup", lambda layers, tokens: speedup)
    model, said = models()["llama"].requires_grad_(False), []
    assert frozen.pack_where_faster(model, say=said.append) == expected
    assert any(isinstance(m, frozen.PackedLinear) for m in model.modules()) == (expected == "packed")
    assert len(said) == 1 and f"{speedup:.2f}" in said[0] and expected in said[0]


def test_the_measurement_weighs_shapes_by_their_number(monkeypatch):
    """Medians of all calls but the first, plain and packed in turn, of three shapes with 4, 2 and 1 layers."""
    took = iter([9, 9, 6, 2, 1, 2, 4, 3, 3, 3] + [9, 9, 1, 2, 1, 2, 1, 2, 1, 2] + [9, 9, 5, 5, 5, 5, 5, 5, 5, 5])

    def seconds(product):
        assert torch.isfinite(product()).all()
        return next(took)

    monkeypatch.setattr(frozen, "_seconds", seconds)
    layers = [nn.Linear(8, width) for width, number in ((8, 4), (16, 2), (24, 1)) for _ in range(number)]
    speedup = frozen.packing_speedup([layer.requires_grad_(False) for layer in layers], tokens=16)
    assert speedup == pytest.approx((4 * 3.5 + 2 * 1 + 5) / (4 * 2.5 + 2 * 2 + 5))


@pytest.mark.parametrize(
    ("eps", "pays", "expected"), [(0.03, True, "mixed"), (0.03, False, "float32"), (1e-3, True, "float32")]
)
def test_what_auto_stands_for(monkeypatch, eps, pays, expected):
    monkeypatch.setattr(frozen, "bfloat16_pays", lambda: pays)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert frozen.choose_dtype(eps) == expected


def test_measuring_takes_no_random_numbers_and_answers():
    state = torch.get_rng_state()
    assert frozen.bfloat16_pays(size=32) in (True, False)
    assert torch.equal(state, torch.get_rng_state())


def test_a_run_remembers(tmp_path, capsys):
    write_model(tmp_path / "base")
    data = write_data(tmp_path / "data.jsonl")
    small = ("--steps", 2, "--queries", 4, "--batch-size", 8, "--rank", 2, "--bottleneck", 8, "--sites", "mlp")
    run = tmp_path / "run"
    files = ("--model", tmp_path / "base", "--data", data, "--output", run)
    code, _, err = main(capsys, "train", *files, "--dtype", "mixed", *small)
    assert code == 0, err
    card = json.loads((run / "adazeta.json").read_text())
    assert (card["dtype"], card["settings"]["dtype"]) == ("mixed", "mixed")
    ask = ("predict", run, "a film", "--json")
    outputs = [main(capsys, *ask, *more)[1] for more in ((), ("--dtype", "mixed"), ("--dtype", "float32"))]
    assert outputs[0] == outputs[1] != ""
    same, other = (json.loads(output)["probabilities"] for output in outputs[1:])
    assert same == pytest.approx(other, abs=1e-2)
