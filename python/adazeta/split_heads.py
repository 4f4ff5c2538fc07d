"""Classification heads that train: they run once per probe, on its rows, and all before them once for many probes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from .forwards import forward_of
from .heads import Pooled, head_modules


def heads_of(model: nn.Module, parameters: Mapping[str, torch.Tensor]) -> list[nn.Module]:
    """Return the modules of ``model``'s classification head, if no other module holds any of ``parameters``, else none.

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
    held = {id(p) for head in heads for p in head.parameters()}
    return heads if all(id(p) in held for p in parameters.values()) else []


@contextmanager
def probe_by_probe(heads: Sequence[nn.Module], others, probes: Sequence[tuple[int, float]]) -> Iterator[None]:
    """Let every head run once per probe, its parameters moved there, on the probe's rows of a probe-major batch.

    Args:
        heads: modules that take the batch's rows in dimension 0 of their positional arguments.
        others: a ``Streamed`` inside its ``with`` statement.
        probes: seed and scale of each.
    """

    def at_each_probe(forward, *args):
        if args[0].shape[0] % len(probes):
            raise ValueError(
                f"{len(probes)} probes are active, but a head gets {args[0].shape[0]} rows: dimension 0 of its "
                "input must be that of the batch"
            )
        outputs = []
        for (seed, scale), *part in zip(probes, *(arg.chunk(len(probes)) for arg in args)):
            others.move_to(seed, scale)
            outputs.append(forward(*part))
        return torch.cat(outputs)

    with ExitStack() as stack:
        for head in heads:
            stack.enter_context(forward_of(head, at_each_probe))
        yield
