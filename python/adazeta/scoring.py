"""Scores of tokens, from hidden states at the scored positions only, in any model with a language-model head.

A classification prompt needs the head at one position, a completion at a few; the logits of all other positions, and
of words that are no candidates, are never computed. The model's own forward runs, so that what a family does between
its blocks and its logits (the transform of a masked language model, scaling, soft capping) stays its own business: a
hook on the last block's output keeps the scored positions, and the output layer multiplies with the asked words' rows.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .batches import along, host, onto
from .tokens import real_tokens
from .tuner import TTModel

#: Tensors of a batch that are inputs of the model; the rest (labels, say) is the loss's.
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids")
#: Rows of an output layer that are multiplied in float32 at a time, where it is stored in another dtype.
ROWS_AT_ONCE = 8192
#: Told rows, columns and the shape of the tokens that are scored, while the model runs (``adazeta.block_ends``).
scored_only: ContextVar[Callable[..., AbstractContextManager] | None] = ContextVar("adazeta_scored_only", default=None)


def language_model(model: nn.Module) -> nn.Module:
    """Return the Hugging Face model inside ``model`` (a ``PeftModel`` or the model itself)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def tt_model_of(model: nn.Module) -> TTModel | None:
    """Return the ``TTModel`` of a ``PeftModel``, None for other models."""
    return getattr(model, "base_model", None) if isinstance(getattr(model, "base_model", None), TTModel) else None


def refuse_prompts(model: nn.Module) -> None:
    """Raise ValueError for prompts and prefixes that PEFT learns: what goes past its forward would not see them."""
    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"{type(config).__name__} acts in PeftModel.forward, which adazeta's losses and generation go past: "
                "give a loss of your own that calls the model"
            )


def kind_of(model: nn.Module) -> str:
    """Return which tokens the head of ``model`` predicts.

    ``"causal"``: the next one; ``"masked"``: the one that stands at the position; ``"seq2seq"``: the decoder's next.

    Raises:
        ValueError: the model has no language-model head.
    """
    inner = language_model(model)
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    if head is None or inner.base_model is inner and not inner.can_generate():
        raise ValueError(
            f"expected a model with a language-model head, got {type(inner).__name__}; the loss of a classifier is "
            "adazeta.losses.HeadScores()"
        )
    if inner.config.is_encoder_decoder:
        return "seq2seq"
    return "causal" if inner.can_generate() else "masked"


def trunk_of(model: nn.Module) -> nn.Module:
    """Return the module inside ``model`` whose output the head reads: it turns token ids into hidden states."""
    inner = language_model(model)
    if not hasattr(inner, "can_generate"):  # a pooled encoder of adazeta.heads
        return inner.encoder
    return inner.get_decoder() if inner.can_generate() else inner.base_model


def aligned(batch: Mapping[str, Any], *per_token: str) -> dict[str, Any]:
    """Move padding on the left of ``input_ids`` to the right and cut what no row needs.

    Left and right padding then score the same in every family, whether it counts positions from the first column
    (GPT-2), from the mask (OPT) or from the tokens (RoBERTa).

    Args:
        batch: ``input_ids [rows, tokens]`` and, unless every token is real, ``attention_mask`` of the same shape.
        per_token: names of further tensors ``[rows, tokens]`` to be moved along, labels for example.

    Returns:
        The batch, its mask (if it has one) of integers.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return dict(batch)
    if mask.dtype == torch.bool or mask.is_floating_point():
        mask = along(torch.Tensor.long, mask)
    batch = {**batch, "attention_mask": mask}
    length, real = mask.shape[1], host(mask)
    first, last = real.argmax(1), length - 1 - real.flip(1).argmax(1)
    kept, moved = int((last - first).max()) + 1, bool(first.any())
    if not moved and kept == length:
        return batch
    columns = (torch.arange(kept) + first[:, None]) % length

    def cut(value):
        return value.gather(1, onto(columns, value.device)) if moved else value[:, :kept]

    names = {"input_ids", "attention_mask", "token_type_ids", "position_ids", *per_token}
    return {name: along(cut, value) if name in names else value for name, value in batch.items()}


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of the model's forward for an aligned batch.

    The mask is left out where no real token could see a padded one, that is with padding on the right of a causal
    model: attention without a mask is faster. But not beside positions: without a mask their gaps would part sequences.
    """
    inputs = {name: batch[name] for name in INPUTS if batch.get(name) is not None}
    mask, kind = inputs.get("attention_mask"), kind_of(model)
    if kind == "causal" and mask is not None and mask.ndim == 2 and "position_ids" not in inputs:
        real = host(mask)
        if bool((real[:, 1:] <= real[:, :-1]).all()):
            del inputs["attention_mask"]
    return inputs if kind == "masked" else {**inputs, "use_cache": False}


def scored_logits(
    model: nn.Module,
    batch: Mapping[str, Any],
    rows: torch.Tensor,
    columns: torch.Tensor,
    words: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the float32 logits at N positions, ``[N, V]``, or ``[N, len(words)]`` of some words only.

    Args:
        model: a model with a language-model head, with or without adapters.
        batch: holds the model's inputs (:data:`INPUTS`), aligned.
        rows, columns: ``[N]`` each; position ``n`` is ``(rows[n], columns[n])`` of ``input_ids``, or of
            ``decoder_input_ids`` for encoder-decoder models.
        words: token ids.

    Raises:
        ValueError: the model has no language-model head, or learns a prompt (:func:`refuse_prompts`).

    Numerics: the output layer's products are float32 whatever the dtype of its weight.
    """
    refuse_prompts(model)
    inputs, inner = model_inputs(model, batch), language_model(model)
    head = inner.get_output_embeddings()
    few = _is_plain(head, inner)
    mask = None if "attention_mask" in inputs else batch.get("attention_mask")
    told = nullcontext() if mask is None else real_tokens(mask)
    tokens, only = inputs.get("decoder_input_ids", inputs["input_ids"]), scored_only.get()
    spared = nullcontext() if only is None else only(rows, columns, tuple(tokens.shape))
    gathering, in_float32 = _gathered(trunk_of(model), rows, columns), _float32_head(head, words if few else None, few)
    with told, spared, gathering as gathered, in_float32:
        logits = inner(**inputs).logits
    logits = (logits[0] if gathered else logits[rows, columns]).float()
    return logits if few or words is None else logits[:, words]


def label_logits(model: nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the logits at every label that is not -100, the label, and its row: ``[N, V]``, ``[N]``, ``[N]``.

    Labels are as for ``transformers`` models: those of a causal model are predicted one position earlier, those of a
    masked one where they stand; an encoder-decoder model's are the decoder's outputs, and its ``decoder_input_ids`` are
    the labels shifted unless the batch gives them.
    """
    kind, labels = kind_of(model), batch["labels"]
    if kind == "seq2seq":
        batch = aligned(batch)
        if batch.get("decoder_input_ids") is None:
            shifted = language_model(model).prepare_decoder_input_ids_from_labels(labels=labels)
            batch["decoder_input_ids"] = shifted
    else:
        batch = aligned(batch, "labels")
        labels = batch["labels"]
    if kind == "causal":
        labels = along(lambda value: value[:, 1:], labels)
    rows, columns = (onto(index, labels.device) for index in (host(labels) != -100).nonzero(as_tuple=True))
    return scored_logits(model, batch, rows, columns), labels[rows, columns], rows


def token_log_probs(model: nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``log p`` of every label that :func:`label_logits` scores, float32, and its row: ``[N]`` each."""
    logits, labels, rows = label_logits(model, batch)
    return -F.cross_entropy(logits, labels, reduction="none"), rows


def sum_by_row(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return ``[count]`` sums of ``values`` ``[N]`` over equal ``rows`` ``[N]``."""
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(0, rows, values)


def _is_plain(head: nn.Module, model: nn.Module) -> bool:
    """Whether rows of ``head.weight`` are words and nothing of the vocabulary's size is added to its result."""
    return (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and "forward" not in vars(head)  # accelerate moves weights in a forward of its own
        and type(head.weight) is nn.Parameter
        and head.weight.is_floating_point()
        and head.out_features == getattr(model.config.get_text_config(), "vocab_size", None)
        and not hasattr(model, "final_logits_bias")
    )


@contextmanager
def _gathered(trunk: nn.Module, rows: torch.Tensor, columns: torch.Tensor) -> Iterator[list]:
    """Let ``trunk`` return hidden states ``[1, N, width]`` of N positions; the list yielded is not empty if it did."""
    done = []

    def keep(module, args, output):
        hidden = output[0]
        if done or not torch.is_tensor(hidden) or hidden.ndim != 3:
            return output
        done.append(True)
        hidden = hidden[rows, columns].unsqueeze(0)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output

    handle = trunk.register_forward_hook(keep)
    try:
        yield done
    finally:
        handle.remove()


@contextmanager
def _float32_head(head: nn.Linear, words: torch.Tensor | None, replace: bool) -> Iterator[None]:
    """Let a plain output layer multiply in float32, with the rows of ``words`` alone where they are given."""
    if not replace:
        yield
        return
    weight = head.weight if words is None else head.weight[words]
    bias = head.bias if words is None or head.bias is None else head.bias[words]

    def forward(x):
        x = x.float()
        if weight.dtype == torch.float32:
            y = F.linear(x, weight)
        else:
            y = torch.cat([F.linear(x, part.float()) for part in weight.split(ROWS_AT_ONCE)], -1)
        return y if bias is None else y + bias.float()

    head.forward = forward
    try:
        yield
    finally:
        del head.forward
