"""Text classification by label words: the model reads a prompt, and the word it would say next is the class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adazeta.data import Example, Prompts
from adazeta.errors import UserError

DEFAULT_TEMPLATE = "Review: {text}\nSentiment:"
DEFAULT_LABEL_WORDS = {"negative": " negative", "positive": " positive"}


@dataclass(frozen=True)
class LabelWordTask:
    """A prompt template and one word per class.

    Class ``c`` has probability ``softmax_c(sum_t log p(word_c[t] | prompt, word_c[:t]))``: a word may have several
    tokens, and prompts end where the word begins.

    Args:
        template: the prompt, with ``{text}`` once; other braces are left as they are.
        label_words: ``{label in the data: word as it follows the prompt}``, at least two, in class order. Most
            tokenizers want the space before the word to be part of it.
        max_tokens: longest prompt in tokens; a longer text loses its end, the template never does.
    """

    template: str = DEFAULT_TEMPLATE
    label_words: tuple[tuple[str, str], ...] = tuple(DEFAULT_LABEL_WORDS.items())
    max_tokens: int = 256

    def __post_init__(self):
        if isinstance(self.label_words, dict):
            object.__setattr__(self, "label_words", tuple(self.label_words.items()))
        if self.template.count("{text}") != 1:
            raise UserError(f"the template must hold {{text}} exactly once, got {self.template!r}")
        if len(self.label_words) < 2:
            raise UserError(f"give at least two label words, got {len(self.label_words)}: {dict(self.label_words)}")
        if any(not word for word in self.words) or len(set(self.words)) < len(self.words):
            raise UserError(f"label words must be different and not empty, got {list(self.words)}")

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels as the data spells them, in class order."""
        return tuple(label for label, _ in self.label_words)

    @property
    def words(self) -> tuple[str, ...]:
        """Label words as they follow the prompt, in class order."""
        return tuple(word for _, word in self.label_words)

    def prompt(self, text: str) -> str:
        """Return the prompt for one text."""
        return self.template.replace("{text}", text)

    def loss(self, tokenizer):
        """Return the fp32 loss per row, :class:`adazeta.losses.LabelWords`, for these words."""
        from adazeta.losses import LabelWords

        return LabelWords(tokenizer, list(self.words))

    def encode_texts(self, tokenizer, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text's prompt, each at most ``max_tokens`` long."""
        encoded = tokenizer([self.prompt(text) for text in texts])["input_ids"]
        return [
            ids if len(ids) <= self.max_tokens else self._shortened(tokenizer, text)
            for text, ids in zip(texts, encoded)
        ]

    def encode(self, tokenizer, examples: Sequence[Example]) -> Prompts:
        """Tokenise the prompts of all examples, once.

        Raises:
            UserError: no examples, or a label without a label word.
        """
        index = {label: number for number, label in enumerate(self.labels)}
        for example in examples:
            if example.label not in index:
                known = ", ".join(repr(label) for label in self.labels)
                raise UserError(f"label {example.label!r} of {example.text[:40]!r} is not one of {known}")
        if not examples:
            raise UserError("the dataset is empty: give at least one example")
        ids = self.encode_texts(tokenizer, [example.text for example in examples])
        return Prompts(ids, [index[example.label] for example in examples])

    def _shortened(self, tokenizer, text: str) -> list[int]:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        keep = self.max_tokens - len(tokenizer(self.prompt(""))["input_ids"])
        # Tokens merge across the seams of the template, so the fit is tried rather than computed.
        while keep > 0:
            ids = tokenizer(self.prompt(tokenizer.decode(tokens[:keep])))["input_ids"]
            if len(ids) <= self.max_tokens:
                return ids
            keep -= len(ids) - self.max_tokens
        raise UserError(f"max_tokens = {self.max_tokens} leaves no room for the text in template {self.template!r}")

    def to_dict(self) -> dict:
        """Return the task as plain JSON values; :meth:`from_dict` is its inverse."""
        return {"template": self.template, "label_words": dict(self.label_words), "max_tokens": self.max_tokens}

    @classmethod
    def from_dict(cls, values: dict) -> LabelWordTask:
        """Build the task from :meth:`to_dict`'s values."""
        return cls(values["template"], tuple(values["label_words"].items()), int(values["max_tokens"]))
