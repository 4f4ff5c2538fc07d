"""One float32 loss per row, from hidden states at the scored positions only.

A classification prompt needs the language-model head at one position, a completion at a few; the logits of all other
positions, and here even of all words that are no label, are never computed.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .probe_tokens import CopiedPrompts, focused, last_real_token, one_copy_below
from .tuner import TTModel


def _language_model(model: nn.Module) -> nn.Module:
    """Return the Hugging Face model inside ``model`` (a ``PeftModel`` or the model itself)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _tt_model(model: nn.Module) -> TTModel | None:
    return getattr(model, "base_model", None) if isinstance(getattr(model, "base_model", None), TTModel) else None


def _acts_on_last_token(model: nn.Module) -> bool:
    tt_model = _tt_model(model)
    return tt_model is not None and any(c.positions == "last" for c in tt_model.peft_config.values())


def _is_right_padded(mask: torch.Tensor) -> bool:
    return bool((mask[:, 1:] <= mask[:, :-1]).all())


def hidden_states(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the last hidden states ``[rows, tokens, width]`` of a causal language model, without its head.

    The mask is ``[rows, tokens]`` with 1 for real tokens, or additive ``[rows, 1, tokens, tokens]``. With padding on
    the right the former is left out: no real token of a causal model attends to a padded one, and attention without a
    mask is faster.
    """
    language_model = _language_model(model)
    plain = attention_mask is not None and attention_mask.ndim == 2 and not language_model.config.is_encoder_decoder
    if plain and _is_right_padded(attention_mask):
        attention_mask = None
    backbone = language_model.base_model
    if backbone is language_model:
        raise ValueError(f"expected a model with a language-model head, got {type(language_model).__name__}")
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    return backbone(**inputs).last_hidden_state


def head_logits(model: nn.Module, hidden: torch.Tensor, words: torch.Tensor | None = None) -> torch.Tensor:
    """Return float32 logits ``[N, V]`` of hidden states ``[N, width]``, or ``[N, len(words)]`` of some words only.

    Raises:
        ValueError: the model has no output embeddings.
    """
    language_model = _language_model(model)
    head = language_model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(language_model).__name__} has no language-model head to score label words with")
    config = language_model.config
    if isinstance(head, nn.Linear) and words is not None:
        weight, bias = head.weight[words], None if head.bias is None else head.bias[words].float()
        logits = F.linear(hidden.float(), weight.float(), bias)
    else:
        logits = head(hidden.to(head.weight.dtype)).float()
        logits = logits if words is None else logits[:, words]
    if (scale := getattr(config, "logits_scaling", None)) is not None:  # Granite divides
        logits = logits / scale
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
        logits = cap * torch.tanh(logits / cap)
    return logits


def trim(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut right padding that no row of this forward needs."""
    length = int(attention_mask.sum(1).max())
    if length < input_ids.shape[1] and _is_right_padded(attention_mask):
        return input_ids[:, :length], attention_mask[:, :length]
    return input_ids, attention_mask


class LabelWords:
    """Cross entropy over label words: ``loss = -log softmax_c(score_c)[label]`` with ``score_c = log p(word_c | x)``.

    For words of one token this is the cross entropy over the candidates' logits at the prompt's last position. Words of
    several tokens are appended to the prompt and scored token by token; a row then costs one forward row per word.

    Args:
        tokenizer: the model's tokenizer.
        words: label words in the order of the class indices, usually with a leading space.

    Raises:
        ValueError: fewer than two words, an empty word, or two words with the same tokens.
    """

    def __init__(self, tokenizer, words: Sequence[str]):
        self.words = list(words)
        tokens = [tokenizer.encode(word, add_special_tokens=False) for word in self.words]
        if len(self.words) < 2:
            raise ValueError(f"expected at least two label words, got {self.words}")
        for word, ids in zip(self.words, tokens):
            if not ids:
                raise ValueError(f"the label word {word!r} has no tokens")
        if len({tuple(ids) for ids in tokens}) < len(tokens):
            raise ValueError(f"the label words {self.words} must differ in their tokens, got {tokens}")
        self.tokens = tokens
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    @property
    def rows_per_example(self) -> int:
        """Forward rows that one example costs."""
        return 1 if all(len(ids) == 1 for ids in self.tokens) else len(self.tokens)

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the loss of every row, ``[B]`` float32, of ``batch`` with input_ids, attention_mask and labels."""
        return F.cross_entropy(self.scores(model, batch), batch["labels"], reduction="none")

    def scores(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return ``[B, C]`` float32 scores; their softmax over C gives the probabilities of the classes."""
        ids, mask = trim(batch["input_ids"], batch["attention_mask"])
        if self.rows_per_example == 1:
            last = last_real_token(mask)
            with focused(_tt_model(model), last):
                hidden = hidden_states(model, ids, mask)
            rows = torch.arange(len(ids), device=ids.device)
            return head_logits(model, hidden[rows, last], self._first_tokens(ids.device))
        if _acts_on_last_token(model):
            raise ValueError(
                f"adapters with positions='last' score label words of one token, got {self.words} of "
                f"{[len(t) for t in self.tokens]} tokens; use positions='all' or other words"
            )
        return self._scores_of_long_words(model, ids, mask)

    def losses_at_copies(
        self, model: nn.Module, batch: Mapping[str, Any], copies: int, share_prefix: str | None = None
    ) -> torch.Tensor:
        """Return the losses at ``copies`` copies of every prompt's last token, ``[B, copies]`` float32.

        Args:
            model: a model with active probe tokens (``adazeta.probe_tokens``).
            batch: input_ids, attention_mask, labels.
            copies: C, probes per row.
            share_prefix: name of the adapter below whose first block one copy is enough, or None.
        """
        ids, mask = trim(batch["input_ids"], batch["attention_mask"])
        inputs = CopiedPrompts.of(ids, mask, copies, next(_language_model(model).parameters()).dtype)
        shared = (
            nullcontext()
            if share_prefix is None
            else one_copy_below(_tt_model(model), share_prefix, inputs.input_ids.shape[1], copies)
        )
        with shared:
            hidden = hidden_states(model, inputs.input_ids, inputs.attention_mask, inputs.position_ids)
        logits = head_logits(model, hidden[:, -copies:].flatten(0, 1), self._first_tokens(ids.device))
        labels = batch["labels"].repeat_interleave(copies)
        return F.cross_entropy(logits, labels, reduction="none").view(-1, copies)

    def _first_tokens(self, device) -> torch.Tensor:
        return torch.tensor([ids[0] for ids in self.tokens], device=device)

    def _scores_of_long_words(self, model, ids, mask) -> torch.Tensor:
        count, device = len(self.tokens), ids.device
        lengths = mask.sum(1).tolist()
        total = max(lengths) + max(len(t) for t in self.tokens)
        # Example-major, so that the probe-major order of the batch is kept.
        rows = torch.full((len(ids) * count, total), self.pad, dtype=ids.dtype, device=device)
        row_mask = torch.zeros_like(rows)
        positions, targets, owners = [], [], []
        for b, length in enumerate(lengths):
            prompt = ids[b][mask[b].bool()]
            for c, word in enumerate(self.tokens):
                r = b * count + c
                rows[r, :length] = prompt
                rows[r, length : length + len(word)] = torch.tensor(word, device=device)
                row_mask[r, : length + len(word)] = 1
                for k, token in enumerate(word):
                    positions.append((r, length - 1 + k))
                    targets.append(token)
                    owners.append(r)
        hidden = hidden_states(model, rows, row_mask)
        where = torch.tensor(positions, device=device)
        logits = head_logits(model, hidden[where[:, 0], where[:, 1]])
        log_p = -F.cross_entropy(logits, torch.tensor(targets, device=device), reduction="none")
        scores = torch.zeros(len(rows), device=device).index_add_(0, torch.tensor(owners, device=device), log_p)
        return scores.view(len(ids), count)


def causal_lm_loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the mean cross entropy of every row over its scored tokens, ``[B]`` float32.

    ``batch`` holds input_ids, attention_mask and labels ``[B, T]`` with -100 at positions that are not scored, as for
    ``transformers`` models; position t of the labels is predicted from position t - 1.

    Raises:
        ValueError: a row without any scored token.
    """
    labels = batch["labels"]
    scored = labels[:, 1:] != -100
    if not bool(scored.any(1).all()):
        raise ValueError("every row needs at least one label that is not -100 after the first position")
    hidden = hidden_states(model, batch["input_ids"], batch.get("attention_mask"))
    row, position = scored.nonzero(as_tuple=True)
    logits = head_logits(model, hidden[row, position])
    losses = F.cross_entropy(logits, labels[:, 1:][scored], reduction="none")
    return torch.zeros(len(labels), device=losses.device).index_add_(0, row, losses) / scored.sum(1)
