"""Losses without a gradient, one float32 per row: ``1 - score``, with accuracy, F1, exact match or any function.

Two kinds. Of answers that a model generates (:class:`GenerationObjective`), and of the classes that a loss of
``adazeta.losses`` scores (:class:`ClassObjective`). Both stand wherever such a loss does, as ``loss_fn`` of
``ZerothOrder.estimate`` and ``loss`` of ``ZOTrainer``.

Such a loss is flat almost everywhere: the two probes of a query differ only where an answer does. So ``eps`` has to be
so large that answers change, and batches so large that some of them do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .generation import generate_answers, prompts_of, texts_of
from .metrics import ANSWER_METRICS, macro_f1
from .probe_tokens import focused, last_real_token
from .scoring import aligned, kind_of, language_model, scored_logits, tt_model_of

#: ``function(prompt, completion, reference) -> number``, higher is better.
Function = Callable[[str, str, Any], float]


class GenerationObjective:
    """``1 - function(prompt, completion, reference)`` of every row's greedy answer.

    The rows of a forward, those of all its probes, are generated together with a key-value cache. ``batch`` holds
    ``input_ids`` and ``attention_mask [B, T]``, padded on either side, and ``references``, a list with anything that
    the function is to compare with; without it the text of the scored ``labels``, as for ``adazeta.losses.Completion``,
    whose batches do as they are. For causal and encoder-decoder models.

    Args:
        tokenizer: the model's.
        function: gets the prompt's text, the answer and the reference of a row, and returns a number, higher is better;
            NaN drops the query. Or ``"f1"`` or ``"exact-match"`` (:mod:`adazeta.metrics`).
        max_new_tokens: most tokens of an answer.
        stands_for: the loss that ``ZOTrainer`` evaluates in its place, if any.

    Raises:
        ValueError: an unknown name, or fewer than one token.
        TypeError: a function that cannot be called.
    """

    rows_per_example = 1
    generates = True

    def __init__(self, tokenizer, function: Function | str, max_new_tokens: int = 32, stands_for=None):
        if isinstance(function, str) and function not in ANSWER_METRICS:
            raise ValueError(f"expected a function or one of {', '.join(ANSWER_METRICS)}, got {function!r}")
        if not isinstance(function, str) and not callable(function):
            raise TypeError(f"expected a function of prompt, completion and reference, got {function!r}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.tokenizer, self.function, self.max_new_tokens = tokenizer, function, max_new_tokens
        self.stands_for = stands_for

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return ``[B]`` float32 losses.

        Raises:
            ValueError: references that are not one a row, or what ``generate_answers`` refuses.
            TypeError: a score that is no number.
        """
        references = references_of(self.tokenizer, batch)
        answers = generate_answers(model, self.tokenizer, batch, self.max_new_tokens)
        prompts = texts_of(self.tokenizer, *prompts_of(model, batch))
        losses = [1 - rate(self.function, *row) for row in zip(prompts, answers, references)]
        return torch.tensor(losses, dtype=torch.float32, device=batch["input_ids"].device)

    def continuous(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the greatest logit of every answer's first token, ``[B]`` float32: what a look at rounding can use."""
        ids, mask = prompts_of(model, batch)
        inputs = aligned({"input_ids": ids, "attention_mask": mask})
        rows, last = torch.arange(len(ids), device=ids.device), last_real_token(inputs["attention_mask"])
        if kind_of(model) == "seq2seq":
            start = language_model(model).config.decoder_start_token_id
            inputs["decoder_input_ids"] = torch.full_like(ids[:, :1], start)
            return scored_logits(model, inputs, rows, torch.zeros_like(rows)).amax(1)
        with focused(tt_model_of(model), last):
            return scored_logits(model, inputs, rows, last).amax(1)


class ClassObjective:
    """``1 - score`` of the class that a classification loss scores highest.

    ``"accuracy"``: the 0-1 loss of a row. ``"f1"``: F1 is no mean over rows, so the macro F1 of all rows of a probe
    stands for each of them (their mean is 1 - F1); with ``directions="batch"`` it is that of the batch, with groups
    that of a group, and with ``directions="example"``, where a probe has one row, it is no more than its accuracy. A
    function gets the names of the predicted and of the right class as completion and reference.

    Args:
        loss: one of ``adazeta.losses`` with ``scores``: label words, a head, candidates.
        function: ``"accuracy"``, ``"f1"``, or ``function(prompt, completion, reference) -> number``.
        names: the classes' names, for a function.
        tokenizer: the model's, for a function.

    Raises:
        ValueError: an unknown name, a loss without scores, or a function without names and tokenizer.
    """

    def __init__(self, loss, function: Function | str, names: Sequence[str] | None = None, tokenizer=None):
        if isinstance(function, str) and function not in ("accuracy", "f1"):
            raise ValueError(f"expected a function, accuracy or f1, got {function!r}")
        if not hasattr(loss, "scores"):
            raise ValueError(f"expected a loss that scores classes, got {type(loss).__name__}")
        if not isinstance(function, str) and (names is None or tokenizer is None):
            raise ValueError("a function of prompt, completion and reference needs names and tokenizer")
        self.stands_for, self.function, self.names, self.tokenizer = loss, function, names, tokenizer
        self.tokens_behind = getattr(loss, "tokens_behind", 0)
        if hasattr(loss, "positions_scored"):
            self.positions_scored = loss.positions_scored
        if hasattr(loss, "scores_at_copies"):
            self.losses_at_copies = self._at_copies
        if function == "f1":
            self.per_row, self.of_probes = self._outcomes, self._f1_of_probes

    @property
    def rows_per_example(self) -> int:
        """Forward rows that one example costs."""
        return self.stands_for.rows_per_example

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return ``[B]`` float32 losses; with ``"f1"`` the batch is one probe's."""
        found = self._outcomes(model, batch)
        return self._f1_of_probes(found[None, None, None], batch)[0, 0, 0] if self.function == "f1" else found

    def _outcomes(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return what a row yields by itself, ``[B]`` float32: its loss, or with ``"f1"`` its predicted class."""
        return self._of_scores(self.stands_for.scores(model, batch), batch, 1)

    def continuous(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the cross entropy of every row, ``[B]`` float32: what a look at rounding can use."""
        return self.stands_for(model, batch)

    def _at_copies(self, model: nn.Module, batch: Mapping[str, Any], copies: int) -> torch.Tensor:
        scores = self.stands_for.scores_at_copies(model, batch, copies)
        return self._of_scores(scores, batch, copies).view(-1, copies)

    def _of_scores(self, scores: torch.Tensor, batch: Mapping[str, Any], copies: int) -> torch.Tensor:
        predicted, labels = scores.argmax(1), batch["labels"].repeat_interleave(copies)
        if self.function == "f1":
            found = predicted.float()
        elif self.function == "accuracy":
            found = (predicted != labels).float()
        else:
            prompts = texts_of(self.tokenizer, batch["input_ids"], batch["attention_mask"])
            texts = [text for text in prompts for _ in range(copies)]
            answers = [(self.names[p], self.names[label]) for p, label in zip(predicted.tolist(), labels.tolist())]
            losses = [1 - rate(self.function, text, *pair) for text, pair in zip(texts, answers)]
            found = torch.tensor(losses, dtype=torch.float32, device=scores.device)
        return found.masked_fill(scores.isnan().any(1), torch.nan)

    @staticmethod
    def _f1_of_probes(predicted: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return ``1 - F1`` of every probe at each of its rows, from the predicted classes ``[G, Q, S, rows]``."""
        groups, queries, signs, rows = predicted.shape
        labels = batch["labels"].to(predicted.device).view(groups, 1, 1, rows).expand_as(predicted)
        unknown = predicted.isnan()
        classes = 1 + max(1, int(labels.max()), int(predicted.nan_to_num().max()))
        flat = predicted.nan_to_num().long().reshape(-1, rows)
        f1 = macro_f1(flat, labels.reshape(-1, rows), classes).view(groups, queries, signs, 1)
        return (1 - f1).expand_as(predicted).masked_fill(unknown.any(-1, keepdim=True), torch.nan)


class CompletionAccuracy:
    """The 0-1 loss of a completion: 0 where every token of the answer is the likeliest, where greedy generation gives
    it. One forward tells, without generation.

    Args:
        loss: an ``adazeta.losses.Completion``, whose batches it takes.
    """

    rows_per_example = 1

    def __init__(self, loss):
        self.stands_for, self.positions_scored = loss, loss.positions_scored

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return ``[B]`` float32 losses."""
        losses, right = self.stands_for.judge(model, batch)
        return (~right).float().masked_fill(losses.isnan(), torch.nan)

    def continuous(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the cross entropy of every row, ``[B]`` float32: what a look at rounding can use."""
        return self.stands_for(model, batch)


def rate(function: Function | str, prompt: str, completion: str, reference: Any) -> float:
    """Return the score of one answer, by a function or by the name of one of ``adazeta.metrics``.

    Raises:
        TypeError: the function returns no number.
    """
    if isinstance(function, str):
        return ANSWER_METRICS[function](completion, reference)
    score = function(prompt, completion, reference)
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the objective's function must return a number, got {score!r} for {prompt[:40]!r}") from error


def references_of(tokenizer, batch: Mapping[str, Any]) -> list:
    """Return the references of a batch: ``references``, or the text of its scored ``labels [rows, tokens]``.

    Raises:
        ValueError: neither, or not as many as there are rows.
    """
    rows, found, labels = len(batch["input_ids"]), batch.get("references"), batch.get("labels")
    if found is None and torch.is_tensor(labels) and labels.ndim == 2:
        scored = ([token for token in row if token != -100] for row in labels.tolist())
        return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in scored]
    if found is None or len(found) != rows:
        got = "none" if found is None else len(found)
        raise ValueError(f"a batch of {rows} rows needs as many references, or labels [rows, tokens]; got {got}")
    return list(found)
