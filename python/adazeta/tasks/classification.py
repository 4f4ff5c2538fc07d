"""Text classification by label words: the model reads a prompt, and the word it would say is the class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from adazeta.data import Example, Prompts
from adazeta.errors import UserError
from adazeta.tasks.prompts import (
    MASK,
    SENTINEL,
    check_template,
    class_indices,
    encode_prompts,
    fill,
    is_one_token,
)

DEFAULT_TEMPLATE = "Review: {text}\nSentiment:"
#: For models that fill in a word: masked language models and encoder-decoders.
MASK_TEMPLATE = "Review: {text} Sentiment: {mask}."
DEFAULT_LABEL_WORDS = {"negative": " negative", "positive": " positive"}


@dataclass(frozen=True)
class LabelWordTask:
    """A prompt template and one word per class.

    Class ``c`` has probability ``softmax_c(sum_t log p(word_c[t] | prompt, word_c[:t]))``. A causal model says the word
    behind the prompt; a masked model fills it in at ``{mask}``, where it must be one token; an encoder-decoder model
    answers with it, behind T5's sentinel where the tokenizer has that instead of a mask token for ``{mask}``.

    Args:
        template: the prompt, with columns of the data, such as ``{text}``, once each; ``{mask}`` as the model needs it.
        label_words: ``{label in the data: word as it follows the prompt}``, at least two, in class order. Most
            tokenizers want the space before the word to be part of it.
        max_tokens: longest prompt in tokens; longer texts lose their end, longest first, the template never does.
    """

    template: str = DEFAULT_TEMPLATE
    label_words: tuple[tuple[str, str], ...] = tuple(DEFAULT_LABEL_WORDS.items())
    max_tokens: int = 256
    kind: ClassVar[str] = "label-words"

    def __post_init__(self):
        if isinstance(self.label_words, dict):
            object.__setattr__(self, "label_words", tuple(self.label_words.items()))
        check_template(self.template, mask=True)
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

    def prompt(self, content: str | Mapping[str, str], mask: str = "") -> str:
        """Return the prompt for one text, or for the value of each column."""
        return fill(self.template, content, mask)

    def loss(self, model, tokenizer):
        """Return the fp32 loss per row for these words: one of :mod:`adazeta.losses`, by the kind of the model.

        Raises:
            UserError: the template's ``{mask}`` does not fit the model or its tokenizer.
            ValueError: words that the tokenizer does not tell apart, or of several tokens at a mask.
        """
        from adazeta.losses import label_words
        from adazeta.scoring import kind_of

        kind, masked = kind_of(model), MASK in self.template
        if kind == "masked" and not masked:
            raise UserError(f"a masked language model fills a word in: put {{mask}} into template {self.template!r}")
        if kind == "causal" and masked:
            raise UserError(
                "a causal language model goes on where the prompt ends: end the template there instead of with {mask}, "
                f"got {self.template!r}"
            )
        sentinel = kind == "seq2seq" and masked and tokenizer.mask_token is None
        if sentinel and not is_one_token(tokenizer, SENTINEL):
            raise UserError(
                f"the tokenizer has neither a mask token nor {SENTINEL}: end the template where the model's answer "
                f"belongs instead of with {{mask}}, got {self.template!r}"
            )
        return label_words(model, tokenizer, list(self.words), prefix=SENTINEL if sentinel else "")

    def encode_texts(
        self, tokenizer, texts: Sequence[str | Mapping[str, str]], say=lambda line: None
    ) -> list[list[int]]:
        """Return the token ids of the prompt of each text (or columns by name), each at most ``max_tokens`` long.

        Raises:
            UserError: a text, or the template, that spells out what stands for the missing word.
        """
        mask = tokenizer.mask_token or SENTINEL
        if MASK in self.template:
            for text in texts:
                if self.prompt(text, mask).count(mask) > 1:
                    raise UserError(
                        f"{str(text)[:40]!r}: {mask} stands for the missing word: leave it out of text and template"
                    )
        return encode_prompts(tokenizer, self.template, texts, self.max_tokens, mask, say)

    def encode(
        self, tokenizer, examples: Sequence[Example], *, seq2seq: bool = False, say=lambda line: None
    ) -> Prompts:
        """Tokenise the prompts of all examples, once.

        Raises:
            UserError: no examples, a label without a label word, or a text that holds the mask token.
        """
        labels = class_indices(examples, self.labels)
        return Prompts(self.encode_texts(tokenizer, [example.content for example in examples], say), labels)
