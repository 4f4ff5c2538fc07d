"""The PEFT method: identity at start, one flat theta, save and load, several adapters, disable, generation."""

import subprocess
import sys

import pytest
import safetensors.torch
import torch
from peft import PeftModel, get_peft_model
from tiny import dense_float64, lm_batch, tiny_adapted, tiny_llama
from transformers import GenerationConfig

from adazeta import TTConfig
from adazeta.probes import Probes, probing
from adazeta.tuner.sites import SITES, placement_of, resolve_layers, resolve_sites
from adazeta_kernels import perturb_


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("sites", ["paper", "published", ["o_proj", "pre:up_proj"]])
@pytest.mark.parametrize("act", ["relu", "gelu", "silu", "tanh", "identity"])
def test_identity_at_initialisation(sites, act):
    base, batch = tiny_llama(), lm_batch()
    expected = logits(base, batch)
    model = get_peft_model(base, TTConfig(rank=3, bottleneck=8, sites=sites, act=act))
    assert torch.equal(logits(model, batch), expected)


def test_paper_initialisation_changes_the_model():
    model = tiny_adapted(init="paper")
    with model.disable_adapter():
        base = logits(model, lm_batch())
    assert (logits(model, lm_batch()) - base).abs().max() > 1e-3


def test_initial_spread_is_the_gain():
    from adazeta.tuner.init import initial_theta
    from adazeta_kernels import TTAdapterLayout

    layout = TTAdapterLayout.auto(1024, 64, 5)
    outputs = []
    for seed in range(30):
        theta = initial_theta(layout, init="identity", gain=0.5, seed=seed, offset=0)
        parts = {s.name: theta[s.offset : s.offset + s.numel].view(s.shape) for s in layout.segments()}
        w = None
        for name, core in parts.items():
            if name.startswith("down") and core.ndim == 3:
                w = core if w is None else torch.tensordot(w, core, dims=1)
        x = torch.randn(200, 1024, generator=torch.Generator().manual_seed(seed))
        outputs.append((x @ w.reshape(1024, 64)).square().mean())
    assert torch.stack(outputs).mean().sqrt() == pytest.approx(0.5, rel=0.15)


def test_parameters_are_views_of_one_theta():
    model = tiny_adapted()
    theta = model.base_model.theta()
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert theta.numel() == total and theta.dtype == torch.float32
    theta.fill_(7.0)
    assert all((p == 7).all() for p in model.parameters() if p.requires_grad)
    assert model.base_model.theta() is theta


def test_theta_is_flat_again_after_a_copy_or_a_cast():
    import copy

    model = copy.deepcopy(tiny_adapted(noise=0.1))
    theta = model.base_model.theta()
    theta.zero_()
    assert all((p == 0).all() for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="must be float32"):
        model.to(torch.bfloat16).base_model.theta()


def test_a_bfloat16_base_keeps_float32_adapters():
    model = tiny_adapted(dtype=torch.bfloat16, noise=0.1)
    assert model.base_model.theta().dtype == torch.float32
    assert logits(model, lm_batch()).dtype == torch.bfloat16


def test_adapter_equals_dense_matrices_in_float64():
    model, batch = tiny_adapted(noise=0.2), lm_batch()
    expected = logits(dense_float64(model, model.base_model.theta()), batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(model, batch)[real].double(), expected[real], atol=1e-5, rtol=0)


def test_published_sites_stand_before_gate_and_up():
    model = tiny_adapted(sites="published", noise=0.3)
    layers = dict(model.base_model.tt_layers("default"))
    placements = {name.rsplit(".", 1)[1]: layer.placement["default"] for name, layer in layers.items()}
    assert placements == {"gate_proj": "pre", "up_proj": "pre", "down_proj": "post"}
    layer = layers["model.layers.0.mlp.up_proj"]
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        got = layer(x)
        bare = layer.base_layer(layer._adapt(x, "default"))
    assert torch.equal(got, bare) and not torch.equal(got, layer.base_layer(x))


def test_save_and_load_in_a_new_process(tmp_path):
    model, batch = tiny_adapted(noise=0.2), lm_batch()
    model.save_pretrained(tmp_path)
    torch.save({"batch": batch, "logits": logits(model, batch)}, tmp_path / "expected.pt")
    code = f"""
import sys, torch
sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
import adazeta.tuner
from peft import PeftModel
from tiny import tiny_llama
saved = torch.load({str(tmp_path / "expected.pt")!r})
model = PeftModel.from_pretrained(tiny_llama(), {str(tmp_path)!r}).eval()
with torch.no_grad():
    out = model(input_ids=saved["batch"]["input_ids"], attention_mask=saved["batch"]["attention_mask"]).logits
assert torch.equal(out, saved["logits"])
assert model.base_model.theta().abs().sum() > 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loaded_parameters_are_views_of_theta(tmp_path, low_cpu_mem_usage):
    model = tiny_adapted(noise=0.2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    theta = loaded.base_model.theta()
    assert torch.equal(theta, model.base_model.theta())
    theta.zero_()
    assert all((p == 0).all() for p in loaded.parameters() if p.requires_grad)


def test_a_state_dict_holds_numbers_that_other_programs_can_save(tmp_path):
    model, batch = tiny_adapted(noise=0.2), lm_batch()
    safetensors.torch.save_model(model, tmp_path / "whole.safetensors")  # accelerate's save_state does; refuses views
    loaded = tiny_adapted()
    safetensors.torch.load_model(loaded, tmp_path / "whole.safetensors")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    kept = model.state_dict(keep_vars=True)
    assert all(kept[name] is parameter for name, parameter in model.named_parameters())


def test_several_adapters_and_disable():
    model, batch = tiny_adapted(noise=0.2), lm_batch()
    first = logits(model, batch)
    with model.disable_adapter():
        base = logits(model, batch)
    model.add_adapter("second", TTConfig(rank=2, bottleneck=4, init_seed=9, init="paper"))
    assert torch.equal(logits(model, batch), first)
    model.set_adapter("second")
    second = logits(model, batch)
    assert not torch.equal(second, first) and not torch.equal(second, base)
    assert model.base_model.theta("second").numel() != model.base_model.theta("default").numel()
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), first)
    with pytest.raises(ValueError, match="no TT adapter named 'third'"):
        model.base_model.theta("third")


def test_print_trainable_parameters(capsys):
    model = tiny_adapted()
    model.print_trainable_parameters()
    assert f"trainable params: {model.base_model.theta().numel():,}" in capsys.readouterr().out


@pytest.mark.parametrize("layers", [[], [3], [0, 5], -1, [0.5], ["0"]])
def test_blocks_that_the_model_does_not_have(layers):
    with pytest.raises(ValueError, match=r"indices of the model's 3 blocks, 0 to 2, got"):
        tiny_adapted(layers=3, layers_to_transform=layers)


def test_layers_to_transform_and_modules_to_save():
    model = tiny_adapted(layers_to_transform=[2], modules_to_save=["lm_head"])
    names = [name for name, _ in model.base_model.tt_layers("default")]
    assert names == ["model.layers.2.self_attn.o_proj", "model.layers.2.mlp.down_proj"]
    assert any("lm_head" in n and p.requires_grad for n, p in model.named_parameters())


@pytest.mark.parametrize("cache", [True, False])
def test_generation_with_and_without_cache_is_the_dense_models(cache):
    model = tiny_adapted(noise=0.2)
    ids = lm_batch(2, 3)["input_ids"]
    dense = dense_float64(model, model.base_model.theta())
    settings = {"max_new_tokens": 8, "do_sample": False, "use_cache": cache, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=ids, **settings), dense.generate(input_ids=ids, **settings))


WATCHERS = ["nobody", "a hook", "a hook on everything", "a forward of its own", "another kind of layer"]


@pytest.mark.parametrize("watcher", WATCHERS)
def test_outputs_of_base_layers_are_overwritten_where_nobody_else_has_them(watcher, monkeypatch):
    model, batch = tiny_adapted(noise=0.2), lm_batch()
    expected = logits(model, batch)
    _, layer = model.base_model.tt_layers("default")[0]
    base, outputs, results = layer.base_layer, [], []
    handles = [layer.register_forward_hook(lambda module, args, output: results.append(output))]
    if watcher == "a hook":
        handles.append(base.register_forward_hook(lambda module, args, output: outputs.append(output)))
    elif watcher == "a hook on everything":
        everywhere = torch.nn.modules.module.register_module_forward_hook
        handles.append(everywhere(lambda module, args, output: outputs.append(output) if module is base else None))
    elif watcher == "another kind of layer":
        base.__class__ = type("Remembering", (torch.nn.Linear,), {"forward": remembering(outputs)})
    elif watcher == "a forward of its own":
        base.forward = remembering(outputs).__get__(base)
    else:
        monkeypatch.setattr(torch.nn.Linear, "forward", remembering(outputs))
    assert torch.equal(logits(model, batch), expected)
    for handle in handles:
        handle.remove()
    if watcher == "nobody":  # it does not know of a changed class
        assert any(y.data_ptr() == results[0].data_ptr() for y in outputs)
    else:
        assert results[0].data_ptr() != outputs[0].data_ptr() and not torch.equal(results[0], outputs[0])


def remembering(outputs):
    def forward(self, x):
        outputs.append(torch.nn.functional.linear(x, self.weight, self.bias))
        return outputs[-1]

    return forward


def test_generation_at_probes_with_cache():
    """Two probes of the same prompt in one batch generate what each generates alone."""
    model = tiny_adapted(noise=0.2)
    ids = lm_batch(1, 4)["input_ids"]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with probing(model.base_model, Probes.of([3, 4], [0.3, 0.3])):
        both = model.generate(input_ids=ids.repeat(2, 1), **settings)
    for seed, row in zip([3, 4], both):
        theta = model.base_model.theta().clone()
        perturb_([theta], [seed], [0.3])
        assert torch.equal(row[None], dense_float64(model, theta).generate(input_ids=ids, **settings))


def test_last_positions_refuse_to_say_several_tokens_at_once():
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    ways = ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_llama(1)})
    ways += ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)},)
    everywhere, last = (tiny_adapted(noise=0.3, positions=positions) for positions in ("all", "last"))
    for way in ways:
        said = everywhere.generate(input_ids=ids, do_sample=False, max_new_tokens=4, **way)
        assert torch.equal(said, everywhere.generate(input_ids=ids, do_sample=False, max_new_tokens=4))
        with pytest.raises(ValueError, match="positions='last'.* several candidate tokens at once"):
            last.generate(input_ids=ids, do_sample=False, max_new_tokens=4, **way)
        with last.disable_adapter():
            last.generate(input_ids=ids, do_sample=False, max_new_tokens=4, **way)


def test_backpropagation_reaches_theta():
    model, batch = tiny_adapted(noise=0.2), lm_batch()
    model(input_ids=batch["input_ids"]).logits.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.abs().sum() > 0 for g in grads)


def test_rows_must_be_a_multiple_of_the_probes():
    model = tiny_adapted()
    with probing(model.base_model, Probes.of([1, 2], [0.1, 0.1])), pytest.raises(ValueError, match="probe-major"):
        logits(model, lm_batch(3))


@pytest.mark.parametrize(
    "config, match",
    [
        ({"act": "mish"}, "act must be one of"),
        ({"init": "zero"}, "init must be one of"),
        ({"bottleneck": 0}, "bottleneck"),
        ({"sites": "everywhere"}, "sites must be"),
        ({"sites": ["middle:o_proj"]}, "placement"),
        ({"rank": 33}, "above min"),
        ({"rank": [1, 2]}, "ranks has 2 entries|one per bond"),
        ({"init_seed": -1}, "init_seed"),
        ({"target_modules": ["norm"]}, "expected a linear layer"),
    ],
)
def test_bad_settings(config, match):
    with pytest.raises(ValueError, match=match):
        tiny_adapted(**config)


def test_mlp_sites_of_the_middle_blocks():
    model = tiny_adapted(layers=6, sites="mlp", layers_to_transform="middle")
    assert [name for name, _ in model.base_model.tt_layers("default")] == [
        "model.layers.2.mlp.down_proj",
        "model.layers.3.mlp.down_proj",
    ]
    assert resolve_layers("middle", {"num_hidden_layers": 30}) == list(range(10, 22))
    assert resolve_layers("middle", {"n_layer": 1}) == [0]
    with pytest.raises(ValueError, match="indices of blocks or 'middle'"):
        resolve_layers("upper", {"num_hidden_layers": 3})
    with pytest.raises(ValueError, match="num_hidden_layers"):
        resolve_layers("middle", {})


def test_unknown_model_type_lists_the_known_ones():
    with pytest.raises(ValueError, match="llama.*name the modules"):
        resolve_sites("paper", "mystery")


def test_width_without_a_tt_shape():
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 577)

        def forward(self, x):
            return self.linear(x)

    with pytest.raises(ValueError, match="577"):
        get_peft_model(Net(), TTConfig(sites=["linear"]))


def test_merging_is_refused():
    with pytest.raises(ValueError, match="cannot be merged"):
        tiny_adapted().merge_adapter()


def test_longest_site_name_wins():
    sites = {"dense": "pre", "output.dense": "post"}
    assert placement_of("layer.0.output.dense", sites) == "post"
    assert placement_of("layer.0.dense", sites) == "pre"
    assert set(SITES["roberta"]["paper"]) == {"attention.output.dense", "output.dense"}
