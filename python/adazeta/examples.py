"""Examples, and how rows of named columns become them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adazeta.errors import UserError
from adazeta.rows import read_rows


@dataclass(frozen=True)
class Example:
    """One text and its label, both as read.

    Args:
        text: what the example asks; of several columns their values with tabs between them.
        label: the class, the answer, or of multiple choice the right candidate, or its number from 0 if none reads so.
        choices: the candidates of multiple choice.
        columns: ``(name in the template, value)`` of each column where there are several.
        references: all right answers where there are several; ``label`` is the first.
    """

    text: str
    label: str
    choices: tuple[str, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    references: tuple[str, ...] = ()

    @property
    def content(self) -> str | dict[str, str]:
        """What fills the template: the text, or the value of every column."""
        return dict(self.columns) or self.text


@dataclass(frozen=True)
class Fields:
    """Where an example is in a row. A name with dots, as in ``answers.text``, looks into a nested row.

    Args:
        texts: ``{name in the template: column}``.
        label: column of the label; None where there is none to be read.
        choices: column of the candidates, a list or text with ``|`` between them, or several columns with one each.
        label_names: what labels that are numbers from 0 stand for. Case does not matter then.
        skip: rows with these labels are left out.
        blank: text in the template's last column that candidates fill. The prompt ends before it, and what follows it
            follows every candidate.
        answers: labels are answers to be said, and may be empty.
    """

    texts: Mapping[str, str] = field(default_factory=lambda: {"text": "text"})
    label: str | None = "label"
    choices: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    blank: str | None = None
    answers: bool = False


def fields_of(settings: Mapping[str, Any], task) -> Fields:
    """Return where the examples of a task are, as settings of :data:`adazeta.options_data.DATA` say.

    Raises:
        UserError: names of ``--columns`` that the template does not have.
    """
    from adazeta.tasks.prompts import columns_of

    names, own = columns_of(task.template), settings["columns"] or {}
    if unknown := [name for name in own if name not in names]:
        raise UserError(f"--columns: the template has no {{{unknown[0]}}}, but {', '.join(names)}")
    texts = {name: own.get(name, settings["text_column"] if name == "text" else name) for name in names}
    choosing = task.kind == "choice"
    return Fields(
        texts=texts,
        label=settings["label_column"],
        choices=tuple(settings["choices_column"]) if choosing else (),
        label_names=() if task.labels is None else tuple(settings["label_names"] or ()),
        skip=tuple(settings["skip_labels"] or ()),
        blank=settings["blank"] if choosing else None,
        answers=task.kind == "completion",
    )


def read_examples(
    source: str | Path,
    fields: Fields | None = None,
    *,
    labels: Sequence[str] | None = None,
    split: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Example]:
    """Read the examples of a source of :func:`adazeta.rows.read_rows`.

    Args:
        source: file, folder or hub name.
        fields: where the examples are in a row; ``text`` and ``label`` by default.
        labels: the labels that may occur; any other is an error. All are accepted by default.
        split: part of a source that has several.
        say: told what is fetched, and how many rows are left out.

    Raises:
        UserError: no such source, unreadable, empty, a missing column, an empty text or label, or an unknown label.
    """
    fields = fields or Fields()
    examples, skipped = [], 0
    for where, row in read_rows(source, split, say=say):
        example = example_of(row, where, fields, labels)
        skipped += example is None
        if example is not None:
            examples.append(example)
    if skipped:
        say(f"{source}: {skipped:,} rows left out, their label is {' or '.join(map(repr, fields.skip))}")
    if not examples:
        raise UserError(f"{source} holds no examples: give at least one row below the header")
    return examples


def _value(row: Mapping[str, Any], column: str, where: str):
    """Return what a row has in a column."""
    if column in row:
        return row[column]
    found: Any = row
    for part in column.split("."):
        if not isinstance(found, Mapping) or part not in found:
            known = ", ".join(name if name == name.strip() else repr(name) for name in map(str, row))
            raise UserError(f"{where}: no column {column!r}, found {known or 'none'}: {_advice(row, column)}")
        found = found[part]
    return found


def _advice(row: Mapping[str, Any], column: str) -> str:
    """Return what to do about a column that a row does not have."""
    names = list(map(str, row))
    if len(names) == 1 and (found := next((mark for mark in ";\t|" if mark in names[0]), None)):
        between = {";": "semicolons", "\t": "tabs", "|": "bars"}[found]
        advice = ", or name the file .tsv" if found == "\t" else ""
        return f"its cells seem to have {between} between them, a .csv has commas: save it with those{advice}"
    near = next((name for name in names if name.strip().casefold() == column.strip().casefold()), None)
    meant = f"is {near!r} meant? " if near is not None else ""
    flags = "--text-column, --label-column, --columns and, for multiple choice, --choices-column"
    return f"{meant}name the columns with {flags}"


def _text(value, where: str) -> str:
    """Return a cell as text; an empty one makes numbers of a column floats, and is NaN there.

    Raises:
        UserError: a cell with parts, which is no text, bytes, or half a character; ``where`` names row and column.
    """
    if isinstance(value, (Mapping, list, tuple, bytes)):
        kind = {dict: "an object", bytes: "bytes"}.get(type(value), "a list")
        shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:37]}..."
        more = "; a dot names a part, as in --text-column outer.inner" if isinstance(value, Mapping) else ""
        raise UserError(f"{where}: expected text or a number, got {kind}, {shown}{more}")
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    text = "" if value is None else str(value).strip()
    check_characters(text, where)
    return text


def check_characters(text: str, where: str) -> None:
    """Raise UserError for half a character, which no UTF-8 file holds: JSON spells one where text was cut in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start].encode("ascii", "backslashreplace").decode()
        raise UserError(
            f"{where}: {half} at character {error.start + 1} is no whole character: the text was cut in the middle of "
            "one, or is not UTF-8"
        ) from error


def example_of(row: Mapping, where: str, fields: Fields, labels: Sequence[str] | None = None) -> Example | None:
    """Return the example in a row, None if its label is one to be left out.

    Raises:
        UserError: a missing column, an empty text or label, a cell that is no text, several classes, or an unknown
            label; ``where`` names the row.
    """
    texts = {name: _text(_value(row, column, where), f"{where}, {column!r}") for name, column in fields.texts.items()}
    for name, column in fields.texts.items():
        if not texts[name]:
            what = "text" if len(texts) == 1 else f"column {column!r}"
            raise UserError(f"{where}: the {what} is empty: fill it in or remove the row")
    choices = _choices([_value(row, column, where) for column in fields.choices], where) if fields.choices else ()
    references: tuple[str, ...] = ()
    label = ""
    if fields.label is not None:
        value = _value(row, fields.label, where)
        listed = isinstance(value, (list, tuple))
        place = f"{where}, {fields.label!r}"
        references = tuple(_text(v, place) for v in value) if listed else ()
        label = (references or ("",))[0] if listed else _text(value, place)
        if label in fields.skip:
            return None
        if len(set(references)) > 1 and not (choices or fields.answers):
            raise UserError(f"{place}: a text has one class, got several labels, {list(references)}: leave one of them")
        if choices and listed:
            label, choices = _right_choice(references, choices, where)
        elif choices:
            label = _candidate(value, label, choices, where)
        label = _class(label, fields.label_names)
        if not label and not fields.answers:
            raise UserError(f"{where}: the label is empty: fill it in or remove the row")
        if labels is not None and label not in labels:
            known = ", ".join(repr(name) for name in labels)
            raise UserError(
                f"{where}: label {label!r} is not one of {known}: correct the row, or set --label-words or --labels"
            )
    if fields.blank:
        texts, choices, label = _fill_blank(texts, choices, label, fields.blank, where)
    columns = tuple(texts.items()) if len(texts) > 1 else ()
    return Example("\t".join(texts.values()), label, choices, columns, references if len(references) > 1 else ())


def _class(label: str, names: Sequence[str]) -> str:
    """Return the name of a class that a row spells as its name, in any case, or as its number from 0."""
    if not names or label in names:
        return label
    if label.isdecimal() and int(label) < len(names):
        return names[int(label)]
    return {name.casefold(): name for name in names}.get(label.casefold(), label)


def _choices(values: list, where: str) -> tuple[str, ...]:
    if len(values) == 1:
        values = list(values[0]) if isinstance(values[0], (list, tuple)) else str(values[0]).split("|")
    choices = tuple(_text(choice, f"{where}, a candidate") for choice in values)
    if not all(choices) or len(set(choices)) < len(choices):
        raise UserError(f"{where}: candidates must be different and not empty, got {list(choices)}")
    return choices


def _candidate(value, label: str, choices: tuple[str, ...], where: str) -> str:
    """Return the label of a choice, a candidate in place of a number that is the text of another one."""
    if label not in choices or not label.isdecimal() or int(label) >= len(choices):
        return label
    meant = choices[int(label)]
    if isinstance(value, str) and label != meant:
        raise UserError(
            f"{where}: label {label!r} is a candidate, and also the number from 0 of another, {meant!r}: in a .jsonl "
            f'write {label} for the number, or ["{label}"] for the text'
        )
    return meant


def _right_choice(references: Iterable[str], choices: tuple[str, ...], where: str) -> tuple[str, tuple[str, ...]]:
    """Return the first right answer among the candidates, and the candidates without the other right ones."""
    right = [choice for choice in references if choice in choices]
    if not right:
        raise UserError(f"{where}: none of the answers {list(references)} is one of the candidates {list(choices)}")
    return right[0], tuple(choice for choice in choices if choice == right[0] or choice not in right)


def _fill_blank(texts: dict[str, str], choices: tuple[str, ...], label: str, blank: str, where: str):
    """Return texts, candidates and label where candidates go on with what follows the blank in the last column."""
    name = list(texts)[-1]
    before, found, after = texts[name].partition(blank)
    if not found:
        raise UserError(f"{where}: no {blank!r} in {name!r} for a candidate to fill: set --blank")
    filled = {choice: choice + after for choice in choices}
    return {**texts, name: before.rstrip()}, tuple(filled.values()), filled.get(label, label)
