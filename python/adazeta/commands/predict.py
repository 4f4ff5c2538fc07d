"""Ask a run or a base model: ``adazeta predict``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from ..errors import UserError
from ..objective_options import MAX_NEW_TOKENS
from ..options import EVALUATION, MODEL, add_options, resolve
from ..options_data import DATA, TASK
from . import check_data, command, say, stay_offline
from .opened import JOURNAL, NAME, data_settings, named_task, opened


def add(commands) -> None:
    """Add the command."""
    predict = command(commands, "predict", _predict, "label and probabilities of texts")
    predict.set_defaults(may_go_online=True)
    predict.add_argument("name", metavar="RUN_OR_MODEL", help=NAME)
    predict.add_argument(
        "text",
        nargs="*",
        help="texts to label; '-' reads one a line from standard input. Where the template has several columns, or "
        'there are candidates to choose from, each is a JSON object of columns: {"premise": ..., "hypothesis": ...}',
    )
    predict.add_argument("--json", action="store_true", help="print one JSON object a line (default: off)")
    predict.add_argument("--journal", metavar="FILE", help=JOURNAL)
    predict.add_argument(
        "--output",
        metavar="FILE",
        help="with --data: write the rows with their answers to a .csv, .tsv or .jsonl (default: print them)",
    )
    predict.add_argument("--overwrite", action="store_true", help="replace an earlier --output (default: off)")
    predict.add_argument("--split", help="part of --data, where it has several (default: test)")
    own = replace(DATA[0], help=f"label the rows of {DATA[0].help}; it needs no labels", shown="none, the texts")
    answer = replace(MAX_NEW_TOKENS, shown=f"the run's, else {MAX_NEW_TOKENS.default}")
    evaluation, data = [*EVALUATION[1:], answer], [own, *DATA[1:]]
    add_options(predict, {"evaluation": evaluation, "model": MODEL[1:], "data": data, "task": TASK})


def _predict(arguments) -> int:
    from ..examples import fields_of
    from ..predictions import check_output, predict_file, stream

    given = getattr(arguments, "data", None)
    if (given is None) == (not arguments.text):
        raise UserError("give texts in quotation marks ('-' reads one a line), or --data with rows to label")
    if given == "movies":
        raise UserError("--data: name a file, a folder or a dataset of the hub; `adazeta eval` takes the movies")
    if arguments.output is not None and given is None:
        raise UserError("--output writes the rows of --data with their answers: name a file with --data")
    if not all(text.strip() for text in arguments.text):
        raise UserError("a text to label is empty: give it in quotation marks, or '-' and one text a line")
    if arguments.output is not None:
        check_output(Path(arguments.output), arguments.overwrite)
    data = data_settings(arguments, [*DATA, MAX_NEW_TOKENS])
    size = resolve(vars(arguments), EVALUATION)["batch_size"]
    told = cache(say)  # rows are read twice, and told of once
    settings = {"batch_size": size, "max_new_tokens": data["max_new_tokens"], "say": told}
    check_data(given)
    stay_offline(given)
    task, split = named_task(arguments), arguments.split or "test"
    fields = replace(fields_of(data, task), label=None, skip=())
    _check_asked(given, arguments.text, split, fields, told)
    classifier = opened(arguments, task)
    if arguments.output is not None:
        place = {"split": split, "overwrite": arguments.overwrite}
        count = predict_file(classifier, given, arguments.output, fields, **place, **settings)
        say(f"{count:,} rows written to {arguments.output}")
        return 0
    piped = (1 if sys.stdin.isatty() else size) if "-" in arguments.text else None  # who writes a line wants an answer
    asked = _rows(given, split, fields, told) if given is not None else _texts(arguments.text, fields)
    count = 0
    for example, _, answer in stream(classifier, asked, at_once=piped, **settings):
        _print(arguments.json, example, answer)
        count += 1
    if not count:
        raise UserError("no text to label: give it in quotation marks, or '-' and one text a line")
    return 0


def _check_asked(given: str | None, texts: list[str], split: str, fields, say: Callable[[str], None]) -> None:
    """Raise UserError for a column that the rows lack, no rows, or a text that is no row: before a model is opened."""
    if given is None:
        for _ in _texts([text for text in texts if text != "-"], fields):
            pass
    elif not Path(given).is_fifo() and next(_rows(given, split, fields, say), None) is None:
        raise UserError(f"{given} holds no rows: give at least one below the header")


def _print(as_json: bool, example, answer) -> None:
    if answer.probabilities is None:
        values, line = {"answer": answer.prediction}, answer.prediction
    else:
        values = {"label": answer.prediction, "probabilities": answer.probabilities}
        others = "  ".join(f"{label} {p:.3f}" for label, p in answer.probabilities.items())
        line = f"{answer.prediction}  ({others})  {' | '.join(example.text.splitlines()).replace(chr(9), ' | ')}"
    print(json.dumps({"text": example.content, **values}, ensure_ascii=False) if as_json else line, flush=True)


def _rows(source: str, split: str, fields, say: Callable[[str], None]) -> Iterator[tuple]:
    """Yield the examples in the rows of a source."""
    from ..examples import example_of
    from ..rows import read_rows

    for where, row in read_rows(source, split, say=say):
        yield example_of(row, where, fields), row


def _texts(texts: list[str], fields) -> Iterator[tuple]:
    """Yield the examples in texts, each a row as JSON where examples have several columns; '-' is standard input."""
    from ..examples import Example, check_characters, example_of

    lines = (line.removeprefix("\ufeff") for text in texts for line in (sys.stdin if text == "-" else [text]))
    columns = ", ".join(json.dumps(column) + ": ..." for column in (*fields.texts.values(), *fields.choices))
    for text in filter(None, map(str.strip, lines)):
        if len(fields.texts) == 1 and not fields.choices:
            check_characters(text, repr(text[:40]))
            yield Example(text, ""), None
            continue
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{text[:40]!r}: this run has several columns: give {{{columns}}} as JSON, or --data FILE")
        yield example_of(row, repr(text[:40]), fields), row
