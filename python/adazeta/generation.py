"""Answers of a model to a batch of prompts: greedy, all rows together, with a key-value cache.

Inside ``adazeta.probes.probing`` the rows are probe-major, and all perturbed copies of the model answer together: a
token of every row costs one forward of one column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .errors import UserError
from .positions import most_positions
from .scoring import kind_of, language_model, refuse_prompts, tt_model_of


def generate_answers(
    model: nn.Module, tokenizer, batch: Mapping[str, Any], max_new_tokens: int = 64, *, use_cache: bool = True
) -> list[str]:
    """Return what the model says to every prompt, as text without special tokens and without spaces around it.

    Every row ends at its own end token, or after ``max_new_tokens``. Which tokens end an answer, and anything else that
    changes logits, is as in the model's ``generation_config``, next to the tokenizer's own end token.

    Args:
        model: a causal or encoder-decoder model, in evaluation mode.
        tokenizer: the model's.
        batch: as for :func:`prompts_of`.
        max_new_tokens: most tokens of an answer, at least 1.
        use_cache: keep keys and values of the tokens so far; without it every token costs a forward of all before it.

    Raises:
        UserError: prompt and answer are longer than the model has positions for.
        ValueError: a masked language model, fewer than one token, a prompt without tokens, or adapters with
            ``positions="last"`` where that is no answer's last token: in an encoder, or without a cache.
    """
    refuse_prompts(model)
    kind, inner = kind_of(model), language_model(model)
    if kind == "masked":
        raise ValueError("a masked language model does not generate; use a causal or encoder-decoder model")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    tt_model = tt_model_of(model)
    last = tt_model is not None and any(config.positions == "last" for config in tt_model.peft_config.values())
    if last and (kind == "seq2seq" or not use_cache):
        raise ValueError(
            "adapters with positions='last' act on the last token of a prompt and on all that follow it, which takes a "
            f"causal model with a key-value cache, got {'no cache' if kind == 'causal' else 'an encoder-decoder'}; use "
            "positions='all'"
        )
    ids, mask = prompts_of(model, batch)
    if kind == "causal" and (most := most_positions(inner)) and ids.shape[1] + max_new_tokens > most:
        raise UserError(
            f"a prompt of {ids.shape[1]} tokens and an answer of at most {max_new_tokens} are longer than the model's "
            f"{most} positions: shorten prompts (--max-tokens) or answers (--max-new-tokens)"
        )
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0] if ends else 0
    out = inner.generate(
        input_ids=ids.masked_fill(mask == 0, pad),
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=use_cache,
        return_dict_in_generate=False,
        pad_token_id=pad,
        eos_token_id=ends or None,
    )
    begin = 1 if kind == "seq2seq" else ids.shape[1]  # behind the decoder's start token, or the prompt
    rows = (_until(row, ends) for row in out[:, begin:].tolist())
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def prompts_of(model: nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of the prompts of a batch and their mask, ``[rows, T]`` each, padded on the left.

    Args:
        model: a causal or encoder-decoder model.
        batch: ``input_ids`` and ``attention_mask [rows, tokens]``, padded on either side. Of a causal model's batch
            whose ``labels`` have the same shape, the prompt ends where they begin to be scored (are not -100).

    Raises:
        ValueError: a row without a prompt.
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    kept = torch.ones_like(ids) if mask is None else mask
    labels = batch.get("labels")
    if kind_of(model) == "causal" and torch.is_tensor(labels) and labels.shape == ids.shape:
        kept = kept * (torch.cummax((labels != -100).long(), 1)[0] == 0)
    if not bool(kept.any(1).all()):
        raise ValueError("every row needs a prompt of at least one token")
    order = (kept != 0).long().argsort(dim=1, stable=True)  # the others first
    longest = int((kept != 0).sum(1).max())
    return ids.gather(1, order)[:, -longest:], kept.gather(1, order)[:, -longest:]


def texts_of(tokenizer, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """Return the text of every row's unmasked tokens, without special ones; ``ids`` and ``mask`` are ``[rows, T]``."""
    rows = zip(ids.tolist(), mask.tolist())
    return [tokenizer.decode([i for i, m in zip(*row) if m], skip_special_tokens=True) for row in rows]


def end_tokens(model: nn.Module, tokenizer) -> list[int]:
    """Return the tokens that end an answer: those of the model's ``generation_config`` and the tokenizer's own."""
    found = getattr(language_model(model).generation_config, "eos_token_id", None)
    found = list(found) if isinstance(found, Sequence) else [] if found is None else [int(found)]
    own = tokenizer.eos_token_id
    return found if own is None or own in found else [*found, own]


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Return the tokens before the first of ``ends``."""
    return next((tokens[:index] for index, token in enumerate(tokens) if token in ends), tokens)
