"""What a forward takes in memory, found without running it: the model on tensors that have shapes but no numbers."""

from __future__ import annotations

import inspect
import weakref
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .probes import Probes, probing
from .scoring import language_model, scored_logits, trunk_of
from .tokens import looking


class LiveBytes(TorchDispatchMode):
    """Count the bytes of tensors that operations make inside the ``with`` statement, while they live.

    Attributes:
        now, peak: bytes alive, and the most at a time.
    """

    def __init__(self):
        super().__init__()
        self.peak = self.now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _strided((args, kwargs))}
        for tensor in _strided(result):
            self._count(tensor.untyped_storage(), given)
        return result

    def _count(self, storage, given: set[int]) -> None:
        key = storage._cdata
        if key in self._sizes or key in given:  # a view of a weight, or a result written in place
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@torch.no_grad()
def cache_bytes(model: torch.nn.Module, tokens: int, generated: int) -> int:
    """Return the bytes of keys and values that a row holds at the end of an answer.

    Args:
        model: as for :func:`forward_bytes`.
        tokens: length of the prompt.
        generated: tokens of the answer.
    """
    inner, device = language_model(model), next(model.parameters()).device
    seq2seq = inner.config.is_encoder_decoder
    ids = torch.zeros(1, tokens + (0 if seq2seq else generated), dtype=torch.long, device=device)
    # Without a mask some families look whether the tokens are padding, and here they are not even numbers.
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if seq2seq:
        inputs["decoder_input_ids"] = ids.new_zeros(1, generated)
    held = []
    token = looking.set(True)
    try:
        for use_cache in (False, True):
            with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
                output = inner(**inputs, use_cache=use_cache)
                held.append(live.now)
                del output
    finally:
        looking.reset(token)
    return held[1] - held[0]


@torch.no_grad()
def forward_bytes(
    model: torch.nn.Module, rows: int, tokens: int, *, scored: int = 0, tt_model=None, adapter: str = "default"
) -> int:
    """Return the bytes that a forward takes above the weights, at its peak.

    Args:
        model: a Hugging Face model or a ``PeftModel``, on any device, "meta" included.
        rows: sequences in the forward, each its own probe where ``tt_model`` is given.
        tokens: length of each.
        scored: positions of each that the output layer scores with its whole vocabulary; label words need none.
        tt_model: the ``TTModel`` whose factors count too.
        adapter: name of its adapter.

    Numerics: tensors of torch, not the scratch memory inside an operation. A kernel that differs by device (attention)
    counts as the one for the device of the weights.
    """
    trunk = trunk_of(model)
    device = next(model.parameters()).device
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
    inputs = {"input_ids": ids}
    if getattr(trunk.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, : max(1, scored)]
    if "use_cache" in inspect.signature(trunk.forward).parameters:
        inputs["use_cache"] = False
    probes = nullcontext() if tt_model is None else probing(tt_model, Probes.of([0] * rows, [0.0] * rows, adapter))
    # Families that warn of padding without a mask would look for it, and here are no numbers to look at.
    config, pad = trunk.config, trunk.config.pad_token_id
    config.pad_token_id = None
    token = looking.set(True)
    try:
        with probes, FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
            if scored:
                row = torch.arange(rows, device=device).repeat_interleave(scored)
                column = torch.arange(scored, device=device).repeat(rows)
                logits = scored_logits(model, inputs, row, column)
                F.cross_entropy(logits, torch.zeros_like(row), reduction="none")
            else:
                trunk(**inputs)
    finally:
        config.pad_token_id = pad
        looking.reset(token)
    return live.peak


def _strided(tree) -> list[torch.Tensor]:
    """The tensors in a tree that have memory to look at: packed weights have none."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided]
