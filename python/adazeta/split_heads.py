"""Classification heads that train: they run once per probe, on its rows, and all before them once for many probes.

A head that is one linear layer runs once for all probes, as a batched product with a weight per probe.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from .forwards import forward_of
from .heads import Pooled, head_modules
from .tokens import looking

#: Most numbers of a layer's weights at all probes of a forward; above them it runs probe by probe.
MOST_NUMBERS = 1 << 22


def heads_of(model: nn.Module, parameters: Mapping[str, torch.Tensor]) -> list[nn.Module]:
    """Return the modules of ``model``'s classification head, if no other module holds any of ``parameters``, else none.

    Of a module with adapters, which take the rows of all probes, its parts that hold ``parameters``.

    Args:
        model: with adapters or without.
        parameters: by name, what is trained besides adapters.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(inner, PreTrainedModel):
        if inner.get_output_embeddings() is not None:
            return []  # a language-model head sees scored positions, not rows
    elif not isinstance(inner, Pooled):
        return []
    heads = [inner.get_submodule(name) for name in head_modules(inner)]
    trained = {id(p) for p in parameters.values()}
    heads = [part for head in heads for part in _without_adapters(head, trained)]
    held = {id(p) for head in heads for p in head.parameters()}
    return heads if trained <= held else []


def _without_adapters(module: nn.Module, trained: set[int]) -> list[nn.Module]:
    if not any(isinstance(part, BaseTunerLayer) for part in module.modules()):
        return [module]
    parts = [part for child in module.children() for part in _without_adapters(child, trained)]
    return [part for part in parts if any(id(p) in trained for p in part.parameters())]


@contextmanager
def probe_by_probe(heads: Sequence[nn.Module], others, probes: Sequence[tuple[int, float]]) -> Iterator[None]:
    """Let every head run once per probe, its parameters moved there, on the probe's rows of a probe-major batch.

    Args:
        heads: modules that take the batch's rows in dimension 0 of their positional arguments.
        others: a ``Streamed`` inside its ``with`` statement.
        probes: seed and scale of each.
    """

    def parts(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if x.shape[0] % len(probes):
            raise ValueError(
                f"{len(probes)} probes are active, but a head gets {x.shape[0]} rows: dimension 0 of its "
                "input must be that of the batch"
            )
        return x.chunk(len(probes))

    def at_each_probe(forward, *args):
        outputs = []
        for (seed, scale), *part in zip(probes, *map(parts, args)):
            others.move_to(seed, scale)
            outputs.append(forward(*part))
        return torch.cat(outputs)

    def at_all_probes(layer, forward, x):
        if looking.get() or len(probes) * layer.in_features * layer.out_features > MOST_NUMBERS:
            return at_each_probe(forward, x)
        own = others.of_probes(layer, probes)
        weight, bias = (own[name] if name in own else getattr(layer, name) for name in ("weight", "bias"))
        y = torch.stack(parts(x)).flatten(1, -2) @ weight.mT
        if bias is not None:
            y += bias.unsqueeze(1) if "bias" in own else bias
        return y.view(*x.shape[:-1], -1)

    with ExitStack() as stack:
        for head in heads:
            layer = _linear(head)
            function = at_each_probe if layer is None else partial(at_all_probes, layer)
            stack.enter_context(forward_of(layer or head, function))
        yield


def _linear(head: nn.Module) -> nn.Linear | None:
    """Return the linear layer that ``head`` is, as PEFT wraps it or not; None if it is more."""
    if isinstance(head, ModulesToSaveWrapper) and len(head.active_adapters) == 1:
        head = head.modules_to_save[head.active_adapters[0]]
    return head if type(head) is nn.Linear else None
