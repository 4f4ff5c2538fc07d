"""Text classification by a head: numbers of its own make the classes' scores, and train with the adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from adazeta.data import Example, Prompts
from adazeta.errors import UserError
from adazeta.tasks.prompts import check_template, class_indices, encode_prompts

POOLINGS = ("own", "mean", "attention")


@dataclass(frozen=True)
class HeadTask:
    """Class labels, and the head that tells them apart.

    Args:
        labels: as the data spells them, in class order.
        template: what the model reads, with the data's columns, such as ``{text}``, once each.
        max_tokens: longest input in tokens; a longer text loses its end.
        pooling: ``"own"``, the head that ``transformers`` has for the model; ``"mean"``, a linear layer on the mean of
            the hidden states; or ``"attention"``, one on a mean whose weights train (:class:`adazeta.heads.Pooled`).
        depth: blocks of the model that run, for the two means: the head reads the hidden states behind the last of
            them. None is all; ``"auto"``, before a run begins, the number that :mod:`adazeta.head_depth` finds.
    """

    labels: tuple[str, ...]
    template: str = "{text}"
    max_tokens: int = 256
    pooling: str = "own"
    depth: int | str | None = None
    kind: ClassVar[str] = "head"

    def __post_init__(self):
        object.__setattr__(self, "labels", tuple(self.labels))
        check_template(self.template)
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise UserError(f"a head needs at least two different labels, got {list(self.labels)}")
        if self.pooling not in POOLINGS:
            raise UserError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if self.depth not in (None, "auto") and not (type(self.depth) is int and self.depth > 0):
            raise UserError(f"depth must be a number of blocks, at least 1, or auto, got {self.depth!r}")
        if self.depth is not None and self.pooling == "own":
            raise UserError("--depth is for --pooling mean or attention: the model's own head reads behind all blocks")

    def loss(self, model, tokenizer):
        """Return the fp32 loss per row, :class:`adazeta.losses.HeadScores`."""
        from adazeta.losses import HeadScores

        return HeadScores()

    def encode(
        self, tokenizer, examples: Sequence[Example], *, seq2seq: bool = False, say=lambda line: None
    ) -> Prompts:
        """Tokenise all texts, once.

        Raises:
            UserError: no examples, an unknown label, or texts without the token by which a head of an encoder-decoder
                finds their end, or with another one.
        """
        labels = class_indices(examples, self.labels)
        contents = [example.content for example in examples]
        rows = encode_prompts(tokenizer, self.template, contents, self.max_tokens, say=say)
        if seq2seq:
            ends = [ids.count(tokenizer.eos_token_id) for ids in rows]
            if not min(ends):
                raise UserError(
                    f"the tokenizer does not end texts with {tokenizer.eos_token}, by which the head of this model "
                    "finds their end: use --task label-words, or a tokenizer that does"
                )
            for content, count in zip(contents, ends):
                if count > min(ends):
                    raise UserError(
                        f"{str(content)[:40]!r} holds {tokenizer.eos_token}, by which the head of this model finds the "
                        "end of a text: leave it out"
                    )
        return Prompts(rows, labels)
