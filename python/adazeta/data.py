"""Read labelled texts (CSV, TSV, JSON lines, the movie sentences), split them, and batch them.

Splits are fixed by a seed and a rule that needs no random generator: examples are sorted by
``sha256(f"{seed}\\t{text}")``; the first go to test, the next to dev, the rest to train. A sentence keeps its split
when others come or go, and the same text (up to case and spaces) is never in two splits. Candidates, and labels that
are answers, are part of an example's text here.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adazeta.errors import UserError

SPLITS = ("train", "dev", "test")
SPLIT_SEED = 0
MOVIE_TEST, MOVIE_DEV = 1000, 500
MOVIE_MIN_RATING = 0.5
MOVIE_LABELS = ("negative", "positive")


@dataclass(frozen=True)
class Example:
    """One text and its label, both as read; ``choices`` are the candidates of multiple choice."""

    text: str
    label: str
    choices: tuple[str, ...] = ()


def read_examples(
    path: str | Path,
    *,
    text_column: str = "text",
    label_column: str = "label",
    labels: Sequence[str] | None = None,
    choices_column: str | None = None,
    answers: bool = False,
) -> list[Example]:
    """Read labelled texts from a file with named columns.

    Args:
        path: ``.csv`` or ``.tsv`` with a header line, or ``.jsonl`` with one object a line; UTF-8.
        text_column: name of the column (key) that holds the text.
        label_column: name of the column (key) that holds the label.
        labels: the labels that may occur; any other is an error. All are accepted by default.
        choices_column: name of the column (key) that holds an example's candidates: a list, or text with ``|`` between
            them. None leaves them out.
        answers: labels are answers to be said, and may be empty.

    Raises:
        UserError: no such file, unreadable, empty, a missing column, an empty text or label, or an unknown label.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such data file: {path}; give a .csv, .tsv or .jsonl file, or 'movies'")
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _json_rows, ".ndjson": _json_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: unknown kind of data file {path.suffix!r}; give a .csv, .tsv or .jsonl file")
    examples = []
    try:
        for where, row in readers[path.suffix.lower()](path):
            for column in filter(None, (text_column, label_column, choices_column)):
                if column not in row:
                    known = ", ".join(str(name) for name in row if name is not None)
                    raise UserError(
                        f"{where}: no column {column!r}, found {known or 'none'}: name the columns with --text-column, "
                        "--label-column and, for multiple choice, --choices-column"
                    )
            choices = _choices(row[choices_column], where) if choices_column else ()
            example = _example(row[text_column], row[label_column], labels, where, choices)
            if not example.label and not answers:
                raise UserError(f"{where}: the label is empty: fill it in or remove the row")
            examples.append(example)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): save it as UTF-8 text") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not examples:
        raise UserError(f"{path} holds no examples: give at least one row below the header")
    return examples


def _choices(value, where: str) -> tuple[str, ...]:
    choices = value if isinstance(value, list) else str(value).split("|")
    choices = tuple(str(choice).strip() for choice in choices)
    if not all(choices) or len(set(choices)) < len(choices):
        raise UserError(f"{where}: candidates must be different and not empty, got {list(choices)}")
    return choices


def _example(text, label, labels: Sequence[str] | None, where: str, choices: tuple[str, ...]) -> Example:
    text = "" if text is None else str(text).strip()
    label = "" if label is None else str(label).strip()
    if not text:
        raise UserError(f"{where}: the text is empty: fill it in or remove the row")
    if labels is not None and label not in labels:
        known = ", ".join(repr(name) for name in labels)
        raise UserError(
            f"{where}: label {label!r} is not one of {known}: correct the row, or set --label-words or --labels"
        )
    return Example(text, label, choices)


def _csv_rows(path: Path) -> Iterable[tuple[str, dict]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        for row in reader:
            yield f"{path}, line {reader.line_num}", {name: row[name] for name in row if row[name] is not None}


def _json_rows(path: Path) -> Iterable[tuple[str, dict]]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: not JSON ({error}): put one object on each line") from error
            if not isinstance(row, dict):
                raise UserError(f'{where}: expected an object such as {{"text": ..., "label": ...}}')
            yield where, row


def read_movies(path: str | Path) -> list[Example]:
    """Read the rated movie sentences: |rating| >= 0.5 is kept, a rating above zero is ``positive``.

    Source: Hutto and Gilbert (2014), mean of 20 ratings from -4 to 4 for each sentence.
    """
    examples = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= MOVIE_MIN_RATING and text.strip():
            examples.append(Example(text.strip(), MOVIE_LABELS[float(rating) > 0]))
    return examples


def _parts(example: Example, answers: bool) -> tuple[str, ...]:
    """Return what an example asks: its text, its candidates and, where it is the answer, its label."""
    return (example.text, *example.choices, *([example.label] if answers else []))


def _key(example: Example, answers: bool) -> tuple[str, ...]:
    """Return what makes two examples the same: the words of their text, whatever the case and the spaces."""
    text, *others = _parts(example, answers)
    return (" ".join(text.casefold().split()), *others)


def split_examples(
    examples: Sequence[Example], *, test: int = 0, dev: int = 0, seed: int = SPLIT_SEED, answers: bool = False
) -> dict[str, list[Example]]:
    """Drop repeated examples, sort by ``sha256(f"{seed}\\t{text}")`` and cut into test, dev and train.

    Args:
        examples: all examples; of those whose texts are equal up to case and spaces, with the same candidates, the
            first is kept. What is sorted by is text and candidates, with tabs between them.
        test, dev: number of examples of those splits; the rest is train.
        seed: any integer; the same seed gives the same splits everywhere.
        answers: labels are answers to be said, and examples with different ones differ.

    Returns:
        ``{"train": [...], "dev": [...], "test": [...]}``.

    Raises:
        UserError: fewer examples than ``test + dev + 1``.
    """
    unique: dict[tuple[str, ...], Example] = {}
    for example in examples:
        unique.setdefault(_key(example, answers), example)
    if len(unique) <= test + dev:
        raise UserError(f"{len(unique)} different texts are too few for {test} test, {dev} dev and some train examples")

    def place(example: Example) -> bytes:
        return hashlib.sha256("\t".join((str(seed), *_parts(example, answers))).encode()).digest()

    ordered = sorted(unique.values(), key=place)
    return {"train": ordered[test + dev :], "dev": ordered[test : test + dev], "test": ordered[:test]}


def load_splits(
    source: str,
    *,
    dev_source: str | None = None,
    labels: Sequence[str] | None,
    text_column: str = "text",
    label_column: str = "label",
    choices_column: str | None = None,
    answers: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, list[Example]]:
    """Load the splits of a data source by name.

    Args:
        source: ``"movies"`` (test 1,000, dev 500, train 8,570 sentences) or a file for :func:`read_examples`.
        dev_source: a file of dev examples; without it a tenth of ``source``, at most 500, is held out.
        labels: labels that may occur; None takes all.
        choices_column, answers: as for :func:`read_examples`.
        say: told what is being fetched, and how many rows of a file are left out.
    """
    if source == "movies":
        from adazeta.assets import movie_file

        if choices_column:
            raise UserError("the movie sentences have no candidates to choose from: name a file with --data")
        unknown = sorted(set(MOVIE_LABELS) - set(labels)) if labels is not None else []
        if unknown:
            raise UserError(
                f"the movie sentences are labelled {' and '.join(MOVIE_LABELS)}, and {unknown[0]!r} has no label word: "
                "set --label-words negative=...,positive=..."
            )
        return split_examples(read_movies(movie_file(say)), test=MOVIE_TEST, dev=MOVIE_DEV)
    columns = {
        "text_column": text_column,
        "label_column": label_column,
        "labels": labels,
        "choices_column": choices_column,
        "answers": answers,
    }
    examples = read_examples(source, **columns)
    splits = split_examples(examples, dev=0 if dev_source else min(500, len(examples) // 10), answers=answers)
    if repeated := len(examples) - sum(map(len, splits.values())):
        say(f"{source}: {repeated:,} of {len(examples):,} rows left out, they repeat earlier ones")
    if not dev_source:
        return splits
    dev = read_examples(dev_source, **columns)
    held_out = {_key(example, answers) for example in dev}
    train = [example for example in splits["train"] if _key(example, answers) not in held_out]
    if not train:
        raise UserError(f"every text of {source} is in {dev_source} too: give different files for training and dev")
    if shared := len(splits["train"]) - len(train):
        say(f"{source}: {shared:,} rows left out, they are in {dev_source} too")
    return {"train": train, "dev": dev, "test": []}


def row_tokens(row: dict) -> int:
    """Return how many tokens long a row is: of multiple choice, its longest candidate with the prompt."""
    ids = row["input_ids"]
    return max(map(len, ids)) if isinstance(ids, list) and ids and isinstance(ids[0], list) else len(ids)


class Prompts(Sequence):
    """Tokenised examples, a map-style dataset of dicts.

    Args:
        input_ids: tokens of each example, or of each of its candidates.
        labels: a class index each, or for completions the tokens that are scored.
        targets: the tokens that are scored of each candidate.
    """

    def __init__(self, input_ids: Sequence[Sequence], labels: Sequence, targets: Sequence[Sequence] | None = None):
        if len(input_ids) != len(labels):
            raise ValueError(f"expected one label per prompt, got {len(input_ids)} prompts and {len(labels)} labels")
        if not input_ids:
            raise UserError("the dataset is empty: give at least one example")
        columns = {"input_ids": input_ids, "labels": labels, **({} if targets is None else {"targets": targets})}
        self._rows = [dict(zip(columns, values)) for values in zip(*columns.values())]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        return self._rows[index]

    def by_length(self) -> Prompts:
        """Return the same rows, longest first: batches then hold little padding, and the first needs most memory."""
        rows = sorted(self._rows, key=row_tokens, reverse=True)
        return Prompts(*([row[name] for row in rows] for name in rows[0]))


class RightPad:
    """Collate rows into int64 tensors, padded on the right.

    ``input_ids`` and ``attention_mask`` become ``[B, T]`` or, of rows with candidates, ``[B, K, T]``; ``labels``
    ``[B]`` or, where they are tokens, padded with -100, as ``targets`` are. A candidate that is none has one token.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict]) -> dict:
        batch = {name: _padded([row[name] for row in rows], -100) for name in rows[0] if name != "input_ids"}
        ids = [row["input_ids"] for row in rows]
        batch["input_ids"] = _padded(ids, self.pad_token_id)
        batch["attention_mask"] = _padded(_ones(ids), 0)
        batch["attention_mask"][..., 0] = 1
        return batch


def _ones(value):
    return [_ones(v) for v in value] if isinstance(value, list) else 1


def _padded(values: list, fill: int):
    """Return nested lists as one int64 tensor, shorter ones filled up."""
    import torch

    if not isinstance(values[0], list):
        return torch.tensor(values, dtype=torch.int64)
    parts = [_padded(v, fill) if v and isinstance(v[0], list) else torch.tensor(v, dtype=torch.int64) for v in values]
    shape = [max(sizes) for sizes in zip(*(part.shape for part in parts))]
    out = torch.full((len(parts), *shape), fill, dtype=torch.int64)
    for index, part in enumerate(parts):
        out[(index, *map(slice, part.shape))] = part
    return out
