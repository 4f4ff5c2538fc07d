"""Answers to many examples, batch by batch: streamed, or written to a file beside the columns that were read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from adazeta.errors import UserError
from adazeta.examples import Example, Fields, example_of
from adazeta.files import replacing
from adazeta.rows import read_rows
from adazeta.runs import Classifier

Row = TypeVar("Row")
Say = Callable[[str], None]
KINDS = (".csv", ".tsv", ".jsonl")
#: Batches that are sorted by length together, so that little padding is computed.
BATCHES = 8


@dataclass(frozen=True)
class Answer:
    """What a model answers: a class, a candidate or, of a completion, a text, which has no ``probabilities``."""

    prediction: str
    probabilities: Mapping[str, float] | None


def answers(
    classifier: Classifier,
    examples: list[Example],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    say: Say = lambda line: None,
) -> list[Answer]:
    """Return the answer to every example, in order; labels are not looked at. ``say`` is told of texts that are cut."""
    task = classifier.task
    if task.kind == "completion":
        asked, settings = [example.content for example in examples], {"batch_size": batch_size, "say": say}
        texts = task.generate(classifier.model, classifier.tokenizer, asked, max_new_tokens=max_new_tokens, **settings)
        return [Answer(text, None) for text in texts]
    found = []
    for example, probabilities in zip(examples, classifier.probabilities(examples, batch_size=batch_size, say=say)):
        by_label = dict(zip(task.labels or example.choices, probabilities))
        found.append(Answer(max(by_label, key=by_label.__getitem__), by_label))
    return found


def stream(
    classifier: Classifier,
    pairs: Iterable[tuple[Example, Row]],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    at_once: int | None = None,
    say: Say = lambda line: None,
) -> Iterator[tuple[Example, Row, Answer]]:
    """Yield examples, what came with them and their answers, whenever ``at_once`` (by default 8 batches) are read.

    ``say`` is told of texts that are cut the first time that there are any.
    """
    rest, notes = iter(pairs), []

    def first(line: str) -> None:
        if not notes:
            say(line)
        notes.append(line)

    while chunk := list(islice(rest, at_once or BATCHES * batch_size)):
        settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "say": first}
        found = answers(classifier, [example for example, _ in chunk], **settings)
        for (example, row), answer in zip(chunk, found):
            yield example, row, answer


def predict_file(
    classifier: Classifier,
    source: str,
    output: str | Path,
    fields: Fields,
    *,
    split: str | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> int:
    """Answer the rows of a source and write them, with their own columns and the answers; return how many.

    All rows are read once before the first is answered, so that a faulty one is told at once; few are in memory.

    Args:
        classifier: the model.
        source: file, folder or hub name, as :func:`adazeta.rows.read_rows` reads it.
        output: a ``.csv`` or ``.tsv`` (``prediction`` and ``p(LABEL)`` of each class, or ``p`` of the candidate) or a
            ``.jsonl`` (``prediction`` and ``probabilities``); aside then renamed.
        fields: where the examples are in a row; labels are not read.
        split: part of a source that has several.
        batch_size: examples a forward.
        max_new_tokens: most tokens of an answer that is generated.
        overwrite: an earlier file at ``output`` may be replaced.
        say: told what is fetched, and of texts that are cut.

    Raises:
        UserError: rows that cannot be read, a column of a name that an answer gets, or ``output`` is in the way.
    """
    from adazeta.progress import progress_bar

    output = Path(output)
    check_output(output, overwrite)
    labels, chooses = classifier.task.labels or (), classifier.task.kind == "choice"
    as_json = output.suffix.lower() == ".jsonl"
    added = ["prediction"]
    if as_json:
        added += ["probabilities"] if labels or chooses else []
    else:
        added += [f"p({label})" for label in labels] + (["p"] if chooses else [])
    columns: dict[str, None] = {}
    total = 0
    for where, row in read_rows(source, split, say=say):
        example_of(row, where, fields)
        columns.update(dict.fromkeys(row))
        total += 1
    if not total:
        raise UserError(f"{source} holds no rows: give at least one below the header")
    if taken := [name for name in added if name in columns]:
        raise UserError(f"{source} has a column {taken[0]!r} already, which the answers get: rename it")

    pairs = ((example_of(row, where, fields), row) for where, row in read_rows(source, split))
    # Columns that are not asked for may hold half a character, which JSON spells as its escape.
    how = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    with replacing(output) as target, target.open("w", **how) as file:
        write = _json_writer(file) if as_json else _csv_writer(file, output, [*columns, *added], labels)
        with progress_bar(total, "predict", "rows") as bar:
            settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "say": say}
            for _, row, answer in stream(classifier, pairs, **settings):
                write(row, answer)
                bar.update()
    return total


def check_output(output: Path, overwrite: bool) -> None:
    """Raise UserError unless answers can be written to ``output``."""
    if output.suffix.lower() not in KINDS:
        raise UserError(f"--output must end in {', '.join(KINDS)}, got {output.name!r}")
    if output.is_dir() or (output.exists() and not overwrite):
        raise UserError(f"{output} exists already: add --overwrite, or choose another --output")


def _json_writer(file) -> Callable[[dict, Answer], None]:
    def write(row: dict, answer: Answer) -> None:
        found: dict[str, Any] = {**row, "prediction": answer.prediction}
        if answer.probabilities is not None:
            found["probabilities"] = answer.probabilities
        file.write(json.dumps(found, ensure_ascii=False, default=str) + "\n")

    return write


def _csv_writer(file, output: Path, columns: list[str], labels) -> Callable[[dict, Answer], None]:
    writer = csv.DictWriter(file, columns, restval="", delimiter="\t" if output.suffix.lower() == ".tsv" else ",")
    writer.writeheader()

    def write(row: dict, answer: Answer) -> None:
        found = {name: _cell(value) for name, value in row.items()}
        found["prediction"] = answer.prediction
        if labels:
            found |= {f"p({label})": f"{answer.probabilities[label]:.6f}" for label in labels}
        elif answer.probabilities is not None:
            found["p"] = f"{answer.probabilities[answer.prediction]:.6f}"
        writer.writerow(found)

    return write


def _cell(value):
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else value
