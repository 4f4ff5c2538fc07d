"""The frozen linear layers on the fastest matrix product of a CPU: in bfloat16, and with weights packed for it.

Both are chosen by trying (``choose_dtype``, ``pack_where_faster``): half the memory and several times the speed where
the hardware multiplies bfloat16, and some per cent to a third more where oneDNN need not reorder a weight in each call.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Iterator
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

from .quantized import is_quantized

# Products of bfloat16 numbers err by 2^-9 of their size. Projected gradients correlate with float32's by .98 at eps .03
# and by .55 at .003 (docs/guide.md).
LEAST_EPS = 0.03
# Less may be noise, and results then change by rounding for nothing.
LEAST_SPEEDUP = 1.05


class MixedLinear(nn.Linear):
    """``x W^T + b`` with a bfloat16 weight, products summed in float32 and rounded once, for x of any dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output in the dtype of ``x``."""
        y = F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        return y if self.bias is None else y + self.bias


class PackedLinear(nn.Linear):
    """A frozen linear layer whose weight lies in the order that oneDNN multiplies in, and nowhere else.

    ``weight`` is a copy in the usual order, made when it is asked for. Moving or casting the module elsewhere unpacks
    it. Where a gradient has to pass, the copy is used: the packed product has none.
    """

    packed: torch.Tensor
    packed_for: int
    was: type[nn.Linear]

    @property
    def weight(self) -> torch.Tensor:
        """The weight ``[out, in]``, a copy."""
        return self.packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output in the dtype of ``x``."""
        if torch.is_grad_enabled() and x.requires_grad:
            y = F.linear(x.to(self.packed.dtype), self.weight).to(x.dtype)
            return y if self.bias is None else y + self.bias
        inside = self.bias if self.bias is not None and self.bias.dtype == self.packed.dtype else None
        y = _packed_product(x.to(self.packed.dtype), self.packed, inside).to(x.dtype)
        return y if self.bias is inside else y.add_(self.bias)  # in place: y is new, and still in the cache

    def __deepcopy__(self, memo):
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        rest = {name: value for name, value in self.__dict__.items() if name != "packed"}
        twin.__dict__.update(copy.deepcopy(rest, memo), packed=self.packed)  # frozen: two layers may share it
        return twin

    def _apply(self, fn, recurse=True):
        there = fn(torch.empty(0, dtype=self.packed.dtype))
        if (there.dtype, there.device) == (self.packed.dtype, self.packed.device):
            return super()._apply(fn, recurse)
        unpack(self)
        return self._apply(fn, recurse)  # of the class it is now


def mix(model: nn.Module) -> int:
    """Turn the frozen float32 linear layers of ``model`` into :class:`MixedLinear`, in place; return how many.

    The output layer stays: losses are differences of its results, and it runs at scored positions only. Norms,
    embeddings, attention and everything between layers stay float32.
    """
    count = 0
    for module in _frozen_linears(model):
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            module.__class__ = MixedLinear
            module.weight = nn.Parameter(module.weight.to(torch.bfloat16), requires_grad=False)
            count += 1
    _leave_file(model)
    return count


def pack(model: nn.Module, tokens: int) -> int:
    """Turn the frozen linear layers of ``model`` into :class:`PackedLinear`, in place; return how many.

    Args:
        model: on the CPU. Its output layer stays, and layers that train, or of another dtype than float32 or bfloat16.
        tokens: tokens in a forward, which the order of packing suits best; any other number works.

    Numerics: the same products in another order of summation: float32 results differ by rounding.
    """
    count = 0
    for module in _frozen_linears(model):
        if _can_be_packed(module):
            packed = _reordered(module.weight.detach(), tokens)
            del module.weight
            module.was, module.__class__ = type(module), PackedLinear
            module.packed, module.packed_for = packed, tokens
            count += 1
    _leave_file(model)
    return count


def unpack(layer: PackedLinear) -> None:
    """Make a packed layer what it was before, in place."""
    weight = layer.weight
    layer.__class__ = layer.was
    del layer.packed, layer.packed_for, layer.was
    bias = layer._parameters.pop("bias")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_parameter("bias", bias)  # behind the weight again: the order is part of a digest


def named_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of ``model``, the weights of packed layers among them, in the order of the plain model."""
    plain = {id(parameter): name for name, parameter in model.named_parameters()}
    for prefix, module in model.named_modules():
        dot = "." if prefix else ""
        if isinstance(module, PackedLinear):
            yield f"{prefix}{dot}weight", module.weight
        for name, parameter in module._parameters.items():
            if plain.get(id(parameter)) == f"{prefix}{dot}{name}":  # a shared one has the name of its first place
                yield f"{prefix}{dot}{name}", parameter


def pack_where_faster(model: nn.Module, tokens: int = 256, say=lambda line: None) -> str:
    """Pack the frozen linear layers if a quick measurement on their own shapes says that it pays.

    Args:
        model: a model in evaluation mode.
        tokens: tokens in a forward.
        say: told what was chosen, and why.

    Returns:
        ``"packed"`` or ``"plain"``.
    """
    layers = [module for module in _frozen_linears(model) if _can_be_packed(module)]
    if not layers:
        return "plain"
    speedup = packing_speedup(layers, tokens)
    chosen = "packed" if speedup >= LEAST_SPEEDUP else "plain"
    if chosen == "packed":
        pack(model, tokens)
    say(f"frozen linear layers {chosen}: packed for oneDNN they are {speedup:.2f} times as fast at {tokens} tokens")
    return chosen


def packing_speedup(layers: list[nn.Linear], tokens: int, repeats: int = 5) -> float:
    """Return the time of plain products over that of packed ones, for the layers' three commonest kinds of shapes."""
    kinds = Counter(_kind(layer) for layer in layers)
    examples = {_kind(layer): layer for layer in layers}
    total = {"plain": 0.0, "packed": 0.0}
    for kind, count in kinds.most_common(3):
        plain = examples[kind]
        packed = nn.Sequential(copy.deepcopy(plain))
        pack(packed, tokens)
        x = torch.ones(tokens, plain.in_features, dtype=plain.weight.dtype)
        seconds: dict[str, list[float]] = {"plain": [], "packed": []}
        for _ in range(repeats):
            seconds["plain"].append(_seconds(lambda: plain(x)))  # noqa: B023
            seconds["packed"].append(_seconds(lambda: packed(x)))  # noqa: B023
        for name, found in seconds.items():
            total[name] += count * median(found[1:])  # the first also sets the library up
    return total["plain"] / total["packed"]


def bfloat16_pays(size: int = 512, repeats: int = 5) -> bool:
    """Tell whether this CPU multiplies bfloat16 matrices at least 1.5 times as fast as float32 ones, by trying."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(size, size, dtype=dtype)
        best[dtype] = min([_seconds(lambda: F.linear(matrix, matrix)) for _ in range(repeats + 1)][1:])  # noqa: B023
    return best[torch.float32] >= 1.5 * best[torch.bfloat16]


def choose_dtype(eps: float) -> str:
    """Return what ``--dtype auto`` stands for in training: ``mixed`` where it pays and harms nothing."""
    if torch.cuda.is_available() or eps < LEAST_EPS:
        return "float32"
    return "mixed" if bfloat16_pays() else "float32"


def _frozen_linears(model: nn.Module) -> list[nn.Linear]:
    """The linear layers without a trainable parameter, but for the output layer, quantised ones and those that must
    stay in float32 by their family's own word: T5 looks at the weight of one in every forward."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept = set(getattr(inner, "_keep_in_fp32_modules", None) or ()) & {"wo"}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and not is_quantized(module._parameters.get("weight"))
        and not kept & set(name.split("."))
        and not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]


def _leave_file(model: nn.Module) -> None:
    """Copy the tensors that were not replaced: weights are loaded as a view of their file, and all of it, the replaced
    ones included, stays in memory as long as one tensor looks at it."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if not is_quantized(tensor) and tensor.device.type == "cpu" and not tensor.requires_grad:
            tensor.data = tensor.data.clone()


def _can_be_packed(module: nn.Linear) -> bool:
    if type(module) not in (nn.Linear, MixedLinear) or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    weight = module.weight
    known = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _multiplies_bfloat16())
    return known and weight.device.type == "cpu" and torch.backends.mkldnn.is_available()


def _kind(layer: nn.Linear) -> tuple:
    return layer.in_features, layer.out_features, layer.weight.dtype, layer.bias is not None, type(layer)


def _multiplies_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _reordered(weight: torch.Tensor, tokens: int) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), tokens)


def _packed_product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
