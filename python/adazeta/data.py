"""Split labelled texts, draw a few of each class, and batch them.

Splits are fixed by a seed and a rule that needs no random generator: examples are sorted by
``sha256(f"{seed}\\t{text}")``; the first go to test, the next to dev, the rest to train. A sentence keeps its split
when others come or go, and the same text (up to case and spaces) is never in two splits. Candidates, and labels that
are answers, are part of an example's text here.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from adazeta.errors import UserError
from adazeta.examples import Example, Fields, read_examples

SPLITS = ("train", "dev", "test")
SPLIT_SEED = 0
MOVIE_TEST, MOVIE_DEV = 1000, 500
MOVIE_MIN_RATING = 0.5
MOVIE_LABELS = ("negative", "positive")


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


def _place(example: Example, seed: int, answers: bool) -> bytes:
    """Return what examples are sorted by."""
    return hashlib.sha256("\t".join((str(seed), *_parts(example, answers))).encode()).digest()


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

    ordered = sorted(unique.values(), key=lambda example: _place(example, seed, answers))
    return {"train": ordered[test + dev :], "dev": ordered[test : test + dev], "test": ordered[:test]}


def load_splits(
    source: str,
    fields: Fields | None = None,
    *,
    labels: Sequence[str] | None = None,
    same_classes: bool = False,
    split: str | None = None,
    dev_source: str | None = None,
    dev_split: str | None = None,
    shots: int | None = None,
    shots_seed: int = SPLIT_SEED,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, list[Example]]:
    """Load the splits of a data source by name.

    Args:
        source: ``"movies"`` (test 1,000, dev 500, train 8,570 sentences) or a source for :func:`read_examples`.
        fields: where the examples are in a row.
        labels: labels that may occur; None takes all.
        same_classes: labels of ``dev_source`` must occur in ``source``.
        split, dev_split: parts of ``source`` and ``dev_source``, where they have several.
        dev_source: dev examples, sorted like the others; without it a tenth of ``source``, at most 500, is held out.
        shots: train on so many examples of each class, and hold out as many for dev, as :func:`take_shots` draws them.
        say: told what is being fetched, and how many rows are left out.

    Raises:
        UserError: data that cannot be read, or too little of it.
    """
    fields = fields or Fields()
    if source == "movies":
        splits = _movies(fields, labels, say)
    else:
        examples = read_examples(source, fields, labels=labels, split=split, say=say)
        held_out = 0 if dev_source or shots else min(500, len(examples) // 10)
        splits = split_examples(examples, dev=held_out, answers=fields.answers)
        if repeated := len(examples) - sum(map(len, splits.values())):
            say(f"{source}: {repeated:,} of {len(examples):,} rows left out, they repeat earlier ones")
    if dev_source:
        known = sorted({e.label for e in splits["train"]}) if same_classes else labels
        dev = read_examples(dev_source, fields, labels=known, split=dev_split, say=say)
        # A file may be sorted by its labels, and evaluations may take the first examples only.
        dev.sort(key=lambda example: _place(example, SPLIT_SEED, fields.answers))
        keys = {_key(example, fields.answers) for example in dev}
        train = [example for example in splits["train"] if _key(example, fields.answers) not in keys]
        if not train:
            raise UserError(f"every text of {source} is in {dev_source} too: give different files for training and dev")
        if shared := len(splits["train"]) - len(train):
            say(f"{source}: {shared:,} rows left out, they are in {dev_source} too")
        splits = {"train": train, "dev": dev, "test": splits["test"]}
    if shots:
        drawn = take_shots(splits["train"], shots, parts=1 if dev_source else 2, fields=fields, seed=shots_seed)
        splits = {**splits, **dict(zip(("train", "dev"), drawn))}
    return splits


def take_shots(
    examples: Sequence[Example], shots: int, *, parts: int = 2, fields: Fields | None = None, seed: int = SPLIT_SEED
) -> list[list[Example]]:
    """Draw ``shots`` examples of each class for each of ``parts`` lists that share none.

    Of answers and choices, which have no classes, it draws as many in all. The first in the order of
    ``sha256(f"{seed}\\t{text}")`` are taken, so the same seed draws the same examples everywhere.

    Raises:
        UserError: fewer examples of a class than that.

    Source: Gao et al. (2021), *Making Pre-trained Language Models Better Few-shot Learners*, section 3: as many
    examples of each class for development as for training, drawn by a seed.
    """
    fields = fields or Fields()
    classes = not (fields.answers or fields.choices)
    drawn: list[list[Example]] = [[] for _ in range(parts)]
    taken: Counter[str] = Counter()
    for example in sorted(examples, key=lambda example: _place(example, seed, fields.answers)):
        group = example.label if classes else ""
        if taken[group] < parts * shots:
            drawn[taken[group] // shots].append(example)
            taken[group] += 1
    for group, count in taken.items():
        if count < parts * shots:
            what = f"examples labelled {group!r}" if classes else "examples"
            whom = f" ({shots} to train, {shots} for dev)" if parts > 1 else ""
            raise UserError(f"--shots {shots} takes {parts * shots} {what}{whom}, but there are {count}")
    return drawn


def _movies(fields: Fields, labels: Sequence[str] | None, say: Callable[[str], None]) -> dict[str, list[Example]]:
    from adazeta.assets import movie_file

    if fields.choices:
        raise UserError("the movie sentences have no candidates to choose from: name a file with --data")
    if len(fields.texts) > 1:
        raise UserError(f"the movie sentences have one column, not {', '.join(fields.texts)}: name a file with --data")
    unknown = sorted(set(MOVIE_LABELS) - set(labels)) if labels is not None else []
    if unknown:
        raise UserError(
            f"the movie sentences are labelled {' and '.join(MOVIE_LABELS)}, and {unknown[0]!r} has no label word: "
            "set --label-words negative=...,positive=..."
        )
    return split_examples(read_movies(movie_file(say)), test=MOVIE_TEST, dev=MOVIE_DEV)


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
        references: the right answer of each example, as text, or a list where there are several.
    """

    def __init__(
        self,
        input_ids: Sequence[Sequence],
        labels: Sequence,
        targets: Sequence[Sequence] | None = None,
        references: Sequence[str | Sequence[str]] | None = None,
    ):
        if len(input_ids) != len(labels):
            raise ValueError(f"expected one label per prompt, got {len(input_ids)} prompts and {len(labels)} labels")
        if not input_ids:
            raise UserError("the dataset is empty: give at least one example")
        columns = {"input_ids": input_ids, "labels": labels, "targets": targets, "references": references}
        columns = {name: values for name, values in columns.items() if values is not None}
        self._rows = [dict(zip(columns, values)) for values in zip(*columns.values())]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        return self._rows[index]

    def by_length(self) -> Prompts:
        """Return the same rows, longest first: batches then hold little padding, and the first needs most memory."""
        rows = sorted(self._rows, key=row_tokens, reverse=True)
        return Prompts(**{name: [row[name] for row in rows] for name in rows[0]})


class RightPad:
    """Collate rows into int64 tensors, padded on the right.

    ``input_ids`` and ``attention_mask`` become ``[B, T]`` or, of rows with candidates, ``[B, K, T]``; ``labels``
    ``[B]`` or, where they are tokens, padded with -100, as ``targets`` are. A candidate that is none has one token.
    ``references`` stay a list.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict]) -> dict:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        batch = {name: _padded(columns[name], -100) for name in ("labels", "targets") if name in columns}
        if "references" in columns:
            batch["references"] = columns["references"]
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
