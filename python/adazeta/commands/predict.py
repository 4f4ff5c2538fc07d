"""Ask a run or a base model: ``adazeta predict``."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

from ..data_options import DATA, TASK
from ..errors import UserError
from ..options import MODEL, add_options
from . import command, say, stay_offline
from .opened import JOURNAL, NAME, data_settings, opened


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
    predict.add_argument("--split", help="part of --data, where it has several (default: test)")
    own = replace(DATA[0], help=f"label the rows of {DATA[0].help}; it needs no labels", shown="none, the texts")
    add_options(predict, {"model": MODEL[1:], "data": [own, *DATA[1:]], "task": TASK})


def _predict(arguments) -> int:
    given = getattr(arguments, "data", None)
    if (given is None) == (not arguments.text):
        raise UserError("give texts in quotation marks ('-' reads one a line), or --data with rows to label")
    data = data_settings(arguments, DATA)
    stay_offline(given)
    texts = []
    for text in arguments.text:
        texts += [line.strip() for line in sys.stdin if line.strip()] if text == "-" else [text.strip()]
    if given is None and not (texts and all(texts)):
        raise UserError("no text to label: give it in quotation marks, or '-' and one text a line")
    classifier = opened(arguments)
    task = classifier.task
    examples = _examples(task, data, texts, given, arguments.split)
    if task.kind == "completion":
        answers = task.generate(classifier.model, classifier.tokenizer, [example.content for example in examples])
        for example, answer in zip(examples, answers):
            _print(arguments.json, answer, text=example.content, answer=answer)
        return 0
    for example, probabilities in zip(examples, classifier.probabilities(examples, say=say)):
        labels = task.labels or example.choices
        by_label = dict(zip(labels, probabilities))
        best = max(by_label, key=by_label.__getitem__)
        others = "  ".join(f"{label} {p:.3f}" for label, p in by_label.items())
        line = f"{best}  ({others})  {' | '.join(example.text.splitlines()).replace(chr(9), ' | ')}"
        _print(arguments.json, line, text=example.content, label=best, probabilities=by_label)
    return 0


def _print(as_json: bool, line: str, **values) -> None:
    print(json.dumps(values, ensure_ascii=False) if as_json else line)


def _examples(task, data: dict, texts: list[str], source: str | None, split: str | None) -> list:
    """Return what is asked: the rows of a source, texts, or texts that are rows as JSON."""
    from ..examples import Example, example_of, fields_of, read_examples

    fields = replace(fields_of(data, task), label=None, skip=())
    if source == "movies":
        raise UserError("--data: name a file, a folder or a dataset of the hub; `adazeta eval` takes the movies")
    if source is not None:
        return read_examples(source, fields, split=split or "test", say=say)
    if len(fields.texts) == 1 and not fields.choices:
        return [Example(text, "") for text in texts]
    columns = ", ".join(json.dumps(column) + ": ..." for column in (*fields.texts.values(), *fields.choices))
    rows = []
    for text in texts:
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{text[:40]!r}: this run has several columns: give {{{columns}}} as JSON, or --data FILE")
        rows.append(example_of(row, repr(text[:40]), fields))
    return rows
