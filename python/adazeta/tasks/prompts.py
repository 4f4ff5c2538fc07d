"""Prompts: a template with the text in it, as token ids, of bounded length."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from adazeta.errors import UserError

MASK = "{mask}"
#: What stands for a missing word where a tokenizer has no mask token: T5's first sentinel.
SENTINEL = "<extra_id_0>"
_NAME = re.compile(r"\{([A-Za-z_]\w*)\}")
_MASK_AT_END = re.compile(r"\s*\{mask\}[.!?]?\s*$")


def columns_of(template: str) -> tuple[str, ...]:
    """Return the names of the columns that fill a template, in its order: every ``{name}`` but ``{mask}``."""
    return tuple(name for name in _NAME.findall(template) if f"{{{name}}}" != MASK)


def check_template(template: str, *, mask: bool = False) -> None:
    """Raise UserError unless a template names columns, each once, and ``{mask}`` at most once or, by default, never."""
    names = columns_of(template)
    if not names or len(set(names)) < len(names):
        raise UserError(
            "the template must name columns of the data, such as {text} or {premise}, each exactly once, got "
            f"{template!r}"
        )
    if template.count(MASK) > mask:
        allowed = "once" if mask else "for label words only"
        raise UserError(f"the template may hold {{mask}} {allowed}, got {template!r}")


def without_last_mask(template: str) -> str:
    """Return a template up to a ``{mask}`` that ends it: the prompt of a model that goes on where the prompt ends."""
    return _MASK_AT_END.sub("", template)


def fill(template: str, content: str | Mapping[str, str], mask: str = "") -> str:
    """Return the prompt for one text, or for the value of each column; other braces are left as they are."""
    values = {**_by_name(template, content), "mask": mask}
    return _NAME.sub(lambda found: values[found[1]], template)


def _by_name(template: str, content: str | Mapping[str, str]) -> Mapping[str, str]:
    names = columns_of(template)
    if isinstance(content, str) and len(names) == 1:
        return {names[0]: content}
    if isinstance(content, str) or not set(names) <= set(content):
        given = "one text" if isinstance(content, str) else f"only {', '.join(content) or 'none'}"
        raise UserError(f"the template needs the columns {', '.join(names)}, got {given}")
    return content


def encode_prompts(
    tokenizer,
    template: str,
    contents: Sequence[str | Mapping[str, str]],
    max_tokens: int,
    mask: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> list[list[int]]:
    """Return the token ids of each prompt, at most ``max_tokens`` each: longer texts lose their end, longest first.

    ``say`` is told once how many do.

    Raises:
        UserError: the template alone is too long.
    """
    if not contents:
        return []
    encoded = tokenizer([fill(template, content, mask) for content in contents])["input_ids"]
    if longer := sum(len(ids) > max_tokens for ids in encoded):
        say(
            f"{longer:,} of {len(encoded):,} prompts are longer than --max-tokens {max_tokens}: their texts lose the "
            f"end (the longest has {max(map(len, encoded)):,} tokens)"
        )
    return [
        ids if len(ids) <= max_tokens else _shortened(tokenizer, template, content, max_tokens, mask)
        for content, ids in zip(contents, encoded)
    ]


def _shortened(tokenizer, template: str, content: str | Mapping[str, str], max_tokens: int, mask: str) -> list[int]:
    texts = {name: text for name, text in _by_name(template, content).items() if f"{{{name}}}" in template}
    tokens = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in texts.items()}
    room = max_tokens - len(tokenizer(fill(template, dict.fromkeys(texts, ""), mask))["input_ids"])
    # Tokens merge across the seams of the template, so the fit is tried rather than computed.
    while room >= len(tokens):
        keep = _longest_first([len(ids) for ids in tokens.values()], room)
        shorter = {name: tokenizer.decode(ids[:keep]) for name, ids in tokens.items()}
        ids = tokenizer(fill(template, shorter, mask))["input_ids"]
        if len(ids) <= max_tokens:
            return ids
        room -= len(ids) - max_tokens
    raise UserError(f"max_tokens = {max_tokens} leaves no room for the text in template {template!r}")


def _longest_first(lengths: Sequence[int], room: int) -> int:
    """Return the largest length that all may keep of their own so that together they take at most ``room``."""
    keep = 0
    while keep < max(lengths) and sum(min(length, keep + 1) for length in lengths) <= room:
        keep += 1
    return keep


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
