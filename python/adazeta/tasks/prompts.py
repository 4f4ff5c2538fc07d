"""Prompts: a template with the text in it, as token ids, of bounded length."""

from __future__ import annotations

from collections.abc import Sequence

from adazeta.errors import UserError

TEXT, MASK = "{text}", "{mask}"
#: What stands for a missing word where a tokenizer has no mask token: T5's first sentinel.
SENTINEL = "<extra_id_0>"


def check_template(template: str, *, mask: bool = False) -> None:
    """Raise UserError unless the template holds ``{text}`` once, and ``{mask}`` at most once or, by default, never."""
    if template.count(TEXT) != 1:
        raise UserError(f"the template must hold {{text}} exactly once, got {template!r}")
    if template.count(MASK) > mask:
        allowed = "once" if mask else "for label words only"
        raise UserError(f"the template may hold {{mask}} {allowed}, got {template!r}")


def fill(template: str, text: str, mask: str = "") -> str:
    """Return the prompt for one text; other braces are left as they are."""
    return template.replace(MASK, mask).replace(TEXT, text)


def encode_prompts(tokenizer, template: str, texts: Sequence[str], max_tokens: int, mask: str = "") -> list[list[int]]:
    """Return the token ids of each text's prompt, at most ``max_tokens`` each: a longer text loses its end.

    Raises:
        UserError: the template alone is too long.
    """
    if not texts:
        return []
    encoded = tokenizer([fill(template, text, mask) for text in texts])["input_ids"]
    return [
        ids if len(ids) <= max_tokens else _shortened(tokenizer, template, text, max_tokens, mask)
        for text, ids in zip(texts, encoded)
    ]


def _shortened(tokenizer, template: str, text: str, max_tokens: int, mask: str) -> list[int]:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    keep = max_tokens - len(tokenizer(fill(template, "", mask))["input_ids"])
    # Tokens merge across the seams of the template, so the fit is tried rather than computed.
    while keep > 0:
        ids = tokenizer(fill(template, tokenizer.decode(tokens[:keep]), mask))["input_ids"]
        if len(ids) <= max_tokens:
            return ids
        keep -= len(ids) - max_tokens
    raise UserError(f"max_tokens = {max_tokens} leaves no room for the text in template {template!r}")


def is_one_token(tokenizer, text: str) -> bool:
    """Return whether a tokenizer knows ``text`` as one token."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id


def class_indices(examples: Sequence, labels: Sequence[str]) -> list[int]:
    """Return the class of every example.

    Raises:
        UserError: a label that is not among ``labels``.
    """
    index = {label: number for number, label in enumerate(labels)}
    for example in examples:
        if example.label not in index:
            known = ", ".join(map(repr, labels))
            raise UserError(f"label {example.label!r} of {example.text[:40]!r} is not one of {known}")
    return [index[example.label] for example in examples]
