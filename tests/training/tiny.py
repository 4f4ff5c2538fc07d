"""Tiny models with random weights, and dense float64 writings of what the adapters compute."""

import copy

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from adazeta import TTConfig
from adazeta_kernels import fill_normal_


def tiny_llama(layers: int = 3, seed: int = 0, **settings) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=settings.pop("vocab_size", 64),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        **settings,
    )
    return LlamaForCausalLM(config).eval()


def tiny_adapted(layers: int = 3, seed: int = 0, noise: float = 0.0, dtype=torch.float32, **config):
    """A tiny Llama with TT adapters; ``noise`` moves theta away from its initial values, so that adapters act."""
    model = get_peft_model(
        tiny_llama(layers, seed).to(dtype), TTConfig(**{"rank": 3, "bottleneck": 8, "act": "gelu", **config})
    ).eval()
    return moved(model, noise)


def moved(model, noise: float):
    """Move the adapter's theta away from its initial values by ``noise`` times a fixed direction; return the model."""
    theta = model.base_model.theta()
    z = torch.empty_like(theta)
    fill_normal_(z, 123)
    theta.add_(noise * z)
    return model


def lm_batch(rows: int = 4, tokens: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids with right padding of several lengths, and next-token labels on the last two real positions."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 64, (rows, tokens), generator=g)
    lengths = torch.tensor([tokens - i % 3 if tokens > 4 else tokens for i in range(rows)])
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    labels = torch.where(torch.arange(tokens) >= lengths[:, None] - 2, ids, -100)
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "labels": torch.where(mask.bool(), labels, -100),
    }


def dense_maps(theta: torch.Tensor, layout) -> tuple[torch.Tensor, ...]:
    """``(W_down, b_down, W_up, b_up)`` in float64 by explicit sums over the cores, independent of the package's ops."""
    parts = {s.name: theta[s.offset : s.offset + s.numel].double().view(s.shape) for s in layout.segments()}

    def linear(side, shape):
        cores = [v for k, v in parts.items() if k.startswith(side) and v.ndim == 3]
        full = cores[0]
        for core in cores[1:]:
            full = torch.tensordot(full, core, dims=1)
        return full.reshape(shape.d_in, shape.d_out)

    biases = [v for v in parts.values() if v.ndim == 1] or [torch.zeros((), dtype=torch.float64)] * 2
    return linear("down", layout.down), biases[0], linear("up", layout.up), biases[1]


class DenseAdapter(torch.nn.Module):
    """Float64 stand-in for a ``TTLayer``: dense matrices, with gelu between them, before or behind the base layer."""

    def __init__(self, layer, theta):
        super().__init__()
        self.base, self.placement, self.scale = layer.base_layer, layer.placement["default"], layer.scale["default"]
        self.weight = getattr(self.base, "weight", None)  # T5 looks at its output projection's
        self.maps = dense_maps(theta, layer.layout["default"])

    def adapt(self, x):
        w_down, b_down, w_up, b_up = self.maps
        return x + self.scale * (torch.nn.functional.gelu(x @ w_down + b_down) @ w_up + b_up)

    def forward(self, x):
        if self.placement == "pre":
            return self.base(self.adapt(x))
        y = self.base(x)
        return (self.adapt(y[0]), *y[1:]) if isinstance(y, tuple) else self.adapt(y)  # GPT-OSS returns the routing too


def dense_float64(model, theta: torch.Tensor, stand_in=DenseAdapter):
    """The base model of ``model`` in float64 with every adapter at ``theta`` written out as dense matrices."""
    tt_model = copy.deepcopy(model).base_model
    base, offset = tt_model.model.double(), 0
    if hasattr(base.config, "_experts_implementation"):
        base.set_experts_implementation("eager")  # the default one has no float64
    for name, layer in tt_model.tt_layers("default"):
        numel = layer.layout["default"].numel
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, stand_in(layer, theta[offset : offset + numel]))
        offset += numel
    return base
