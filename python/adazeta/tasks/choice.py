"""Multiple choice: of an example's own candidates the likeliest is the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from adazeta.data import Example, Prompts
from adazeta.errors import UserError
from adazeta.tasks.answers import AnswerTask, answer_tokens
from adazeta.tasks.prompts import encode_prompts


@dataclass(frozen=True)
class ChoiceTask(AnswerTask):
    """A prompt template; the data gives every example its candidates, and as label the right one or its number from 0.

    Candidate ``k`` has probability ``softmax_k(log p(candidate_k | prompt))``, with the log likelihood divided by the
    candidate's number of tokens unless ``normalize`` is False.

    Args:
        normalize: divide by the number of tokens.
        candidates: the most candidates of an example in training, what a step costs is planned for. All examples are
            filled up to as many; where one has more, up to its number.
    """

    normalize: bool = True
    candidates: int = 2
    kind: ClassVar[str] = "choice"

    def row_loss(self):
        """Return the fp32 loss per row, :class:`adazeta.losses.CandidateLikelihood`."""
        from adazeta.losses import CandidateLikelihood

        return CandidateLikelihood(self.candidates, self.normalize)

    def encode(
        self, tokenizer, examples: Sequence[Example], *, seq2seq: bool = False, say=lambda line: None
    ) -> Prompts:
        """Tokenise every prompt with each of its candidates, once.

        Raises:
            UserError: no examples, fewer than two candidates, or a label that is none of them.
        """
        labels = [right_choice(example) for example in examples]
        most = max([self.candidates, *(len(example.choices) for example in examples)])
        prompts = encode_prompts(tokenizer, self.template, [e.content for e in examples], self.max_tokens, say=say)
        inputs, targets = [], []
        for example, prompt in zip(examples, prompts):
            answers = [answer_tokens(tokenizer, "" if seq2seq else self.template, c) for c in example.choices]
            missing = [[]] * (most - len(answers))
            inputs.append([prompt if seq2seq else prompt + answer for answer in answers] + missing)
            targets.append([answer if seq2seq else [-100] * len(prompt) + answer for answer in answers] + missing)
        return Prompts(inputs, labels, targets)


def right_choice(example: Example) -> int:
    """Return the number of the candidate that the label names, by its text, or its number from 0 if none reads so.

    What a number in a row means is decided where rows are read (:func:`adazeta.examples.example_of`).

    Raises:
        UserError: fewer than two candidates, or none of that name.
    """
    choices, label = example.choices, example.label
    if len(choices) < 2:
        raise UserError(f"{example.text[:40]!r} has {len(choices)} candidates: give at least two in --choices-column")
    if label in choices:
        return choices.index(label)
    if label.isdecimal() and int(label) < len(choices):
        return int(label)
    raise UserError(f"label {label!r} of {example.text[:40]!r} is neither one of {list(choices)} nor its number from 0")
