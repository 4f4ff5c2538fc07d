"""Measure a run or a base model: ``adazeta eval``."""

from __future__ import annotations

import json

from ..errors import UserError
from ..options import DATA, EVALUATION, MODEL, TASK, add_options, resolve
from . import command, say
from .opened import JOURNAL, NAME, opened


def add(commands) -> None:
    """Add the command."""
    evaluate = command(commands, "eval", _eval, "accuracy and loss of a run or of a base model")
    evaluate.add_argument("name", metavar="RUN_OR_MODEL", help=NAME)
    evaluate.add_argument("--split", default="test", help="train, dev, test or all; of a file: all (default: test)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object (default: off)")
    evaluate.add_argument("--journal", metavar="FILE", help=JOURNAL)
    add_options(evaluate, {"evaluation": EVALUATION, "model": MODEL[1:], "data": DATA, "task": TASK})


def _eval(arguments) -> int:
    from ..data import SPLITS, load_splits, read_examples
    from ..progress import progress_bar

    values = resolve(vars(arguments), [*DATA, *EVALUATION])
    if arguments.split not in (*SPLITS, "all"):
        raise UserError(f"--split: expected one of {', '.join(SPLITS)} or all, got {arguments.split!r}")
    classifier = opened(arguments)
    labels = classifier.task.labels
    if values["data"] == "movies":
        splits = load_splits("movies", labels=labels, say=say)
        wanted = SPLITS if arguments.split == "all" else (arguments.split,)
        examples = [example for name in wanted for example in splits[name]]
        what = f"movies, {arguments.split}"
    else:
        columns = {"text_column": values["text_column"], "label_column": values["label_column"]}
        columns["choices_column"] = values["choices_column"] if classifier.task.kind == "choice" else None
        columns["answers"] = classifier.task.kind == "completion"
        examples, what = read_examples(values["data"], labels=labels, **columns), values["data"]
    examples = examples[: values["limit"]]
    with progress_bar(len(examples), "eval", "rows") as bar:
        result = classifier.evaluate(examples, batch_size=values["batch_size"], progress=bar.update)
    if arguments.json:
        numbers = {key: result[key] for key in ("accuracy", "loss")}
        print(json.dumps({"name": arguments.name, "data": what, "examples": len(examples), **numbers}))
    else:
        print(f"accuracy {result['accuracy']:.4f}  loss {result['loss']:.4f}  ({len(examples):,} examples of {what})")
    return 0
