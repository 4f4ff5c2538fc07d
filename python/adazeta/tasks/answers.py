"""What tasks whose answers are free text share: a prompt up to where the answer begins, and the answer's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adazeta.continuation import continuation
from adazeta.errors import UserError
from adazeta.tasks.prompts import check_template


def answer_tokens(tokenizer, template: str, answer: str) -> list[int]:
    """Return the tokens of an answer as it follows the template: with a space before it unless one is there."""
    space = "" if not template or template[-1].isspace() else " "
    return continuation(tokenizer, space + answer)


@dataclass(frozen=True)
class AnswerTask:
    """A prompt that a model goes on from.

    Args:
        template: the prompt, with the data's columns, such as ``{text}``, once each, up to where the answer begins.
        max_tokens: longest prompt in tokens, the answer not counted; a longer text loses its end.
    """

    template: str = "{text}"
    max_tokens: int = 256
    kind: ClassVar[str]
    labels: ClassVar[None] = None

    def __post_init__(self):
        check_template(self.template)

    def loss(self, model, tokenizer):
        """Return the fp32 loss per row.

        Raises:
            UserError: a masked language model, which says nothing of what follows a prompt.
        """
        from adazeta.scoring import kind_of

        if kind_of(model) == "masked":
            raise UserError(
                f"task {self.kind} needs a causal or encoder-decoder model; a masked one takes label-words or head"
            )
        return self.row_loss()
