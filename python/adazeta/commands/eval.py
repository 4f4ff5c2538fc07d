"""Measure a run or a base model: ``adazeta eval``."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError
from ..memory import freed_memory_kept
from ..objective_options import MEASURED
from ..options import EVALUATION, MODEL, add_options, resolve
from ..options_data import DATA, SPLITTING, TASK
from . import check_data, command, say, stay_offline
from .opened import JOURNAL, NAME, data_settings, named_task, opened


def add(commands) -> None:
    """Add the command."""
    evaluate = command(commands, "eval", _eval, "accuracy and loss of a run or of a base model")
    evaluate.set_defaults(may_go_online=True)
    evaluate.add_argument("name", metavar="RUN_OR_MODEL", help=NAME)
    evaluate.add_argument(
        "--split",
        help="of movies: train, dev, test or all; else the part of --data (default: test, or the run's --eval-split)",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object (default: off)")
    evaluate.add_argument("--journal", metavar="FILE", help=JOURNAL)
    add_options(evaluate, {"evaluation": [*EVALUATION, *MEASURED], "model": MODEL[1:], "data": DATA, "task": TASK})


def _eval(arguments) -> int:
    check_data(vars(arguments).get("data"))
    values = resolve(vars(arguments), EVALUATION)
    data = data_settings(arguments, [*DATA, *SPLITTING, *MEASURED])
    stay_offline(data["data"])
    if "data" not in vars(arguments) and Path(data["data"]).is_file():
        raise UserError(f"give --data with rows to measure on: the run was trained on {data['data']}")
    if data["data"] == "movies":
        _movie_splits(arguments.split)
    task = named_task(arguments)
    examples, what = _examples(task, data, arguments.split)
    examples = examples[: values["limit"]]

    from ..measures import measures_of
    from ..progress import progress_bar

    classifier = opened(arguments, task)
    with freed_memory_kept(), progress_bar(len(examples), "eval", "rows") as bar:
        measures = measures_of(data, classifier.task, classifier.tokenizer)
        size, update = values["batch_size"], bar.update
        result = classifier.evaluate(examples, batch_size=size, progress=update, say=say, measures=measures)
    numbers = {key: value for key, value in result.items() if isinstance(value, float)}
    if arguments.json:
        print(json.dumps({"name": arguments.name, "data": what, "examples": len(examples), **numbers}))
    else:
        line = "  ".join(f"{key} {value:.4f}" for key, value in numbers.items())
        print(f"{line}  ({len(examples):,} examples of {what})")
    return 0


def _movie_splits(name: str | None) -> tuple[str, ...]:
    from ..data import SPLITS

    if name not in (None, *SPLITS, "all"):
        raise UserError(f"--split: expected one of {', '.join(SPLITS)} or all, got {name!r}")
    return SPLITS if name == "all" else (name or "test",)


def _examples(task, data: dict, split: str | None) -> tuple[list, str]:
    """Return the examples to evaluate on, and their name."""
    from ..data import load_splits
    from ..examples import fields_of, read_examples

    source, fields = data["data"], fields_of(data, task)
    if source == "movies":
        splits = load_splits("movies", fields, labels=task.labels, say=say)
        return [example for name in _movie_splits(split) for example in splits[name]], f"movies, {split or 'test'}"
    if Path(source).is_file() and split not in (None, "all"):
        raise UserError(f"--split {split}: {source} is one file, which has no parts: leave --split out")
    return read_examples(source, fields, labels=task.labels, split=split or data["eval_split"], say=say), source
