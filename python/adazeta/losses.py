"""One float32 loss per row: ``loss(model, batch) -> [rows]``.

A classification loss also has ``scores(model, batch) -> [rows, classes]``, whose softmax gives the probabilities, and
``rows_per_example``, the forward rows that one example costs. All of them take padding on either side.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .batches import along, host, onto
from .continuation import continuation
from .probe_tokens import CopiedPrompts, focused, last_real_token
from .scoring import (
    aligned,
    kind_of,
    label_logits,
    language_model,
    refuse_prompts,
    scored_logits,
    sum_by_row,
    token_log_probs,
    tt_model_of,
)
from .tokens import real_tokens


def refuse_last(model: nn.Module, what: str) -> None:
    """Raise ValueError if an adapter acts on the last prompt token alone, which only causal label words score."""
    tt_model = tt_model_of(model)
    if tt_model is not None and any(config.positions == "last" for config in tt_model.peft_config.values()):
        raise ValueError(
            f"adapters with positions='last' act on the last prompt token of a causal model, which label words of one "
            f"token score, but not {what}; use positions='all'"
        )


class Completion:
    """The mean cross entropy of every row over its scored tokens.

    ``batch`` holds input_ids, attention_mask and labels with -100 at positions that are not scored, as for the
    ``transformers`` models with a language-model head: causal (completions), masked, or encoder-decoder.

    Args:
        label_smoothing: weight of the uniform distribution over the vocabulary in the targets, in [0, 1).
    """

    rows_per_example = 1

    def __init__(self, label_smoothing: float = 0.0):
        self.label_smoothing = label_smoothing

    def positions_scored(self, batch: Mapping[str, Any]) -> int:
        """Return the most positions of an example that are scored with the whole vocabulary.

        Raises:
            ValueError: no labels, or classes in place of tokens.
        """
        labels = batch.get("labels")
        if labels is None or labels.ndim != 2:
            got = "none" if labels is None else f"shape {tuple(labels.shape)}"
            raise ValueError(
                f"the loss of a language model needs labels [rows, tokens], -100 where nothing is scored, got {got}; "
                "classes [rows] are what adazeta.LabelWords and adazeta.losses.HeadScores score"
            )
        return int((host(labels) != -100).sum(1).max())

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return ``[B]`` float32 losses.

        Raises:
            ValueError: a row without any scored token, or adapters with ``positions="last"``.
        """
        return self._of(model, batch)[0]

    def judge(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses and whether all scored tokens of a row are the likeliest ones, ``[B]`` each."""
        losses, logits, labels, rows = self._of(model, batch)
        wrong = sum_by_row((logits.argmax(-1) != labels).float(), rows, len(losses))
        return losses, wrong == 0

    def _of(self, model, batch):
        refuse_last(model, "completions")
        logits, labels, rows = label_logits(model, batch)
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        counts = sum_by_row(torch.ones_like(losses), rows, len(batch["labels"]))
        if len(host(rows).unique()) < len(counts):
            raise ValueError("every row needs at least one label that is not -100, in a causal model behind the first")
        return sum_by_row(losses, rows, len(counts)) / counts, logits, labels, rows


def lm_loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the mean cross entropy of every row over its scored tokens, ``[B]`` float32: :class:`Completion`."""
    return Completion()(model, batch)


lm_loss.positions_scored = Completion().positions_scored


class _Scored:
    """A loss whose scores name a class: their cross entropy with ``batch["labels"]``.

    ``label_smoothing`` is the weight of the uniform distribution over the classes in the targets; None: not possible.
    """

    rows_per_example = 1
    label_smoothing: float | None = 0.0

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the loss of every row, ``[B]`` float32; ``batch`` holds the model's inputs and labels ``[B]``."""
        return self.of_scores(self.scores(model, batch), batch["labels"])

    def of_scores(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss ``[B]`` of every row of scores ``[B, C]``."""
        return F.cross_entropy(scores, labels, reduction="none", label_smoothing=self.label_smoothing or 0.0)


class _Words(_Scored):
    """Label words, checked: at least two, different in their tokens."""

    kind, role = "", ""

    def __init__(self, tokenizer, words: Sequence[str]):
        self.words = list(words)
        tokens = [continuation(tokenizer, word) for word in self.words]
        if len(self.words) < 2:
            raise ValueError(f"expected at least two label words, got {self.words}")
        unknown = getattr(tokenizer, "unk_token_id", None)
        for word, ids in zip(self.words, tokens):
            if not ids:
                raise ValueError(f"the label word {word!r} has no tokens")
            if unknown is not None and unknown in ids:
                known = tokenizer.unk_token
                raise ValueError(
                    f"the tokenizer does not know the label word {word!r}, it reads {known}: choose another"
                )
        if len({tuple(ids) for ids in tokens}) < len(tokens):
            raise ValueError(f"the label words {self.words} must differ in their tokens, got {tokens}")
        self.tokens = tokens
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    @property
    def rows_per_example(self) -> int:
        """Forward rows that one example costs."""
        return 1 if all(len(ids) == 1 for ids in self.tokens) else len(self.tokens)

    def positions_scored(self, batch: Mapping[str, Any]) -> int:
        """Return the positions of an example that are scored with the whole vocabulary: those of long words."""
        return sum(map(len, self.tokens)) if self.rows_per_example > 1 else 0

    def _check(self, model: nn.Module) -> None:
        if (kind := kind_of(model)) != self.kind:
            raise ValueError(f"{type(self).__name__} scores {self.role}, got a {kind} {type(model).__name__}")

    def _first_tokens(self, device) -> torch.Tensor:
        return onto(torch.tensor([ids[0] for ids in self.tokens]), device)

    def _aligned(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch :func:`aligned`, with a mask also where all tokens are real."""
        ids = batch["input_ids"]
        if batch.get("attention_mask") is None:
            return {**batch, "attention_mask": onto(torch.ones(ids.shape, dtype=torch.int64), ids.device)}
        return aligned(batch)

    def _padded(self, device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the words' tokens and which of them are real, ``[C, longest]`` each."""
        longest = max(map(len, self.tokens))
        ids = torch.tensor([word + [self.pad] * (longest - len(word)) for word in self.tokens], device=device)
        lengths = torch.tensor([len(word) for word in self.tokens], device=device)
        return ids, torch.arange(longest, device=device) < lengths[:, None]


class LabelWords(_Words):
    """Cross entropy over label words: ``loss = -log softmax_c(score_c)[label]`` with ``score_c = log p(word_c | x)``.

    For causal models. With words of one token this is the cross entropy over the candidates' logits at the prompt's
    last position. Words of several tokens are appended to the prompt and scored token by token; a row then costs one
    forward row per word.

    Args:
        tokenizer: the model's tokenizer.
        words: label words in the order of the class indices, usually with a leading space.

    Raises:
        ValueError: fewer than two words, an empty or unknown word, or two words with the same tokens.
    """

    kind, role = "causal", "the next token of a causal language model"

    @property
    def tokens_behind(self) -> int:
        """Tokens that scoring puts behind a prompt."""
        return max(map(len, self.tokens)) if self.rows_per_example > 1 else 0

    def scores(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return ``[B, C]`` float32 scores; their softmax over C gives the probabilities of the classes."""
        self._check(model)
        batch = self._aligned(batch)
        ids = batch["input_ids"]
        if self.rows_per_example > 1:
            refuse_last(model, f"label words of several tokens ({self.words})")
            return self._scores_of_long_words(model, batch)
        last = along(last_real_token, batch["attention_mask"])
        with focused(tt_model_of(model), last):
            rows = onto(torch.arange(len(ids)), ids.device)
            return scored_logits(model, batch, rows, last, self._first_tokens(ids.device))

    def losses_at_copies(self, model: nn.Module, batch: Mapping[str, Any], copies: int) -> torch.Tensor:
        """Return the losses at ``copies`` copies of every prompt's last token, ``[B, copies]`` float32.

        Args:
            model: a model with active probe tokens (``adazeta.probe_tokens``).
            batch: input_ids, attention_mask, labels.
            copies: C, probes per row.
        """
        labels = batch["labels"].repeat_interleave(copies)
        return self.of_scores(self.scores_at_copies(model, batch, copies), labels).view(-1, copies)

    def scores_at_copies(self, model: nn.Module, batch: Mapping[str, Any], copies: int) -> torch.Tensor:
        """Return the float32 scores at the copies of :meth:`losses_at_copies`, ``[B * copies, C]``, row by row."""
        self._check(model)
        batch = self._aligned(batch)
        ids = batch["input_ids"]
        dtype = next(language_model(model).parameters()).dtype
        own = {name: batch.get(name) for name in ("position_ids", "token_type_ids")}
        prompts = CopiedPrompts.of(ids, batch["attention_mask"], copies, dtype, **own)
        length = prompts.input_ids.shape[1]
        inputs = {name: getattr(prompts, name) for name in ("input_ids", "attention_mask", *own)}
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(copies)
        columns = torch.arange(length - copies, length, device=ids.device).repeat(len(ids))
        with real_tokens(batch["attention_mask"], copies):
            return scored_logits(model, inputs, rows, columns, self._first_tokens(ids.device))

    def _scores_of_long_words(self, model, batch) -> torch.Tensor:
        words, real = self._padded(batch["input_ids"].device)
        count, longest = words.shape
        examples = len(batch["input_ids"])
        # Example-major, so that the probe-major order of the batch is kept.
        ids, mask = (
            F.pad(batch[name].repeat_interleave(count, 0), (0, longest), value=value)
            for name, value in (("input_ids", self.pad), ("attention_mask", 0))
        )
        behind = mask.sum(1, keepdim=True) + torch.arange(longest, device=ids.device)
        labels = torch.full_like(ids, -100)
        labels.scatter_(1, behind, words.masked_fill(~real, -100).repeat(examples, 1))
        ids.scatter_(1, behind, words.repeat(examples, 1))
        mask.scatter_(1, behind, real.to(mask.dtype).repeat(examples, 1))
        log_p, rows = token_log_probs(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
        return sum_by_row(log_p, rows, len(ids)).view(examples, count)


class MaskedLabelWords(_Words):
    """Cross entropy over label words at the mask token of the prompt, for masked language models.

    Args:
        tokenizer: the model's tokenizer, with a mask token.
        words: label words of one token each, in the order of the class indices.

    Raises:
        ValueError: as for :class:`LabelWords`; a word of several tokens, or a tokenizer without a mask token.
    """

    kind, role = "masked", "the mask token of a masked language model"

    def __init__(self, tokenizer, words: Sequence[str]):
        super().__init__(tokenizer, words)
        if self.rows_per_example > 1:
            lengths = {word: len(ids) for word, ids in zip(self.words, self.tokens)}
            raise ValueError(f"a mask stands for one token: choose label words of one token, got {lengths}")
        if tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token: label words of this model cannot be scored at a mask")
        self.mask_token = tokenizer.mask_token_id

    def scores(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return ``[B, C]`` float32 scores, the words' logits at the mask.

        Raises:
            ValueError: a prompt without a mask token, or with several.
        """
        self._check(model)
        refuse_last(model, "words at a mask")
        batch = self._aligned(batch)
        ids = batch["input_ids"]
        masks = host(ids) == self.mask_token
        if not bool((masks.sum(1) == 1).all()):
            raise ValueError(f"every prompt needs one mask token, got {masks.sum(1).tolist()} of them")
        rows, columns = (onto(index, ids.device) for index in (torch.arange(len(ids)), masks.long().argmax(1)))
        return scored_logits(model, batch, rows, columns, self._first_tokens(ids.device))


class Seq2SeqLabelWords(_Words):
    """Cross entropy over label words as the decoder's answer to the prompt, for encoder-decoder models.

    Words of one token are scored in one forward row; longer ones cost a forward row per word.

    Args:
        tokenizer: the model's tokenizer.
        words: label words in the order of the class indices.
        prefix: what the decoder has said before, ``"<extra_id_0>"`` for a T5 prompt with this sentinel in the word's
            place, else nothing (as for BART, whose decoder does not repeat its mask).

    Raises:
        ValueError: as for :class:`LabelWords`.
    """

    kind, role = "seq2seq", "the answer of an encoder-decoder model"

    def __init__(self, tokenizer, words: Sequence[str], prefix: str = ""):
        super().__init__(tokenizer, words)
        self.prefix = tokenizer.encode(prefix, add_special_tokens=False) if prefix else []

    def scores(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return ``[B, C]`` float32 scores; their softmax over C gives the probabilities of the classes."""
        self._check(model)
        refuse_last(model, "an encoder-decoder model's answers")
        batch = self._aligned(batch)
        ids = batch["input_ids"]
        start = language_model(model).config.decoder_start_token_id
        begin = torch.tensor([start, *self.prefix], device=ids.device)
        if self.rows_per_example == 1:
            rows = torch.arange(len(ids), device=ids.device)
            batch["decoder_input_ids"] = begin.expand(len(ids), -1)
            columns = torch.full_like(rows, len(self.prefix))
            return scored_logits(model, batch, rows, columns, self._first_tokens(ids.device))
        words, real = self._padded(ids.device)
        count, examples = len(words), len(ids)
        repeated = {name: batch[name].repeat_interleave(count, 0) for name in ("input_ids", "attention_mask")}
        decoder = torch.cat((begin.expand(count, -1), words[:, :-1]), 1).repeat(examples, 1)
        labels = F.pad(words.masked_fill(~real, -100), (len(self.prefix), 0), value=-100).repeat(examples, 1)
        log_p, rows = token_log_probs(model, {**repeated, "decoder_input_ids": decoder, "labels": labels})
        return sum_by_row(log_p, rows, len(labels)).view(examples, count)


def label_words(model: nn.Module, tokenizer, words: Sequence[str], prefix: str = "") -> _Words:
    """Return the label-word loss for the kind of ``model``: causal, masked or encoder-decoder."""
    kind = kind_of(model)
    if kind == "seq2seq":
        return Seq2SeqLabelWords(tokenizer, words, prefix)
    return (LabelWords if kind == "causal" else MaskedLabelWords)(tokenizer, words)


class CandidateLikelihood(_Scored):
    """Cross entropy over each example's own candidates: ``score_k = log p(candidate_k | prompt)``, for multiple choice.

    ``batch`` holds, per example and candidate, ``input_ids`` and ``attention_mask [B, K, T]``, ``targets [B, K, U]``
    with -100 where nothing is scored (as the labels of :func:`lm_loss`), and ``labels [B]``, the right candidate's
    index. A candidate without any target is none, and gets the score ``-inf``.

    Args:
        candidates: K, the most candidates of an example.
        normalize: divide a candidate's log likelihood by its number of tokens.
    """

    label_smoothing = None  # of scores of -inf there is no mean

    def __init__(self, candidates: int, normalize: bool = False):
        self.rows_per_example, self.normalize = candidates, normalize

    def positions_scored(self, batch: Mapping[str, Any]) -> int:
        """Return the most positions of an example's candidates that are scored with the whole vocabulary."""
        return int((host(batch["targets"]) != -100).flatten(1).sum(1).max())

    def scores(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return ``[B, K]`` float32 scores."""
        refuse_last(model, "candidates of several tokens")
        examples, count = batch["targets"].shape[:2]
        inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask", "labels": "targets"}
        flat = {name: along(lambda value: value.flatten(0, 1), batch[key]) for name, key in inputs.items()}
        log_p, rows = token_log_probs(model, flat)
        counts = sum_by_row(torch.ones_like(log_p), rows, examples * count)
        sums = sum_by_row(log_p, rows, examples * count)
        scores = (sums / counts.clamp(min=1) if self.normalize else sums).masked_fill(counts == 0, -torch.inf)
        return scores.view(examples, count)


class HeadScores(_Scored):
    """Cross entropy over the logits of a model with a sequence-classification head, which trains with the adapters."""

    def scores(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return ``[B, C]`` float32 logits of the head."""
        refuse_last(model, "a classification head")
        refuse_prompts(model)
        batch = aligned(batch)
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: batch[name] for name in names if batch.get(name) is not None}
        return language_model(model)(**inputs).logits.float()
