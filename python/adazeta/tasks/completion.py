"""Completion: the model goes on with an answer, which is scored token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from adazeta.data import Example, Prompts
from adazeta.tasks.answers import AnswerTask, answer_tokens
from adazeta.tasks.prompts import encode_prompts


@dataclass(frozen=True)
class CompletionTask(AnswerTask):
    """A prompt template; the data's labels are the answers. The loss is the mean over their tokens and their end."""

    kind: ClassVar[str] = "completion"

    def row_loss(self):
        """Return the fp32 loss per row, :class:`adazeta.losses.Completion`."""
        from adazeta.losses import Completion

        return Completion()

    def encode(
        self, tokenizer, examples: Sequence[Example], *, seq2seq: bool = False, say=lambda line: None
    ) -> Prompts:
        """Tokenise all prompts and answers, once.

        Raises:
            UserError: no examples.
        """
        prompts = encode_prompts(tokenizer, self.template, [e.content for e in examples], self.max_tokens, say=say)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        answers = [answer_tokens(tokenizer, "" if seq2seq else self.template, e.label) + end for e in examples]
        references = [list(e.references) or e.label for e in examples]  # a list only where several answers are right
        if seq2seq:
            return Prompts(prompts, answers, references=references)
        rows = [(prompt + answer, [-100] * len(prompt) + answer) for prompt, answer in zip(prompts, answers)]
        return Prompts([ids for ids, _ in rows], [labels for _, labels in rows], references=references)

    def generate(
        self,
        model,
        tokenizer,
        texts: Sequence,
        *,
        max_new_tokens: int = 32,
        batch_size: int = 32,
        say=lambda line: None,
    ) -> list[str]:
        """Return the model's greedy answer to every text (or columns by name), with a key-value cache.

        ``say`` is told of texts that are cut.
        """
        from adazeta.batches import to_device
        from adazeta.data import RightPad
        from adazeta.generation import generate_answers

        prompts, answers = encode_prompts(tokenizer, self.template, texts, self.max_tokens, say=say), []
        device = next(model.parameters()).device
        for first in range(0, len(prompts), batch_size):
            batch = RightPad(0)([{"input_ids": ids} for ids in prompts[first : first + batch_size]])
            answers += generate_answers(model, tokenizer, to_device(batch, device), max_new_tokens)
        return answers
