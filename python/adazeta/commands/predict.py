"""Ask a run or a base model: ``adazeta predict``."""

from __future__ import annotations

import json
import sys

from ..errors import UserError
from ..options import MODEL, TASK, add_options
from . import command
from .opened import JOURNAL, NAME, opened


def add(commands) -> None:
    """Add the command."""
    predict = command(commands, "predict", _predict, "label and probabilities of texts")
    predict.add_argument("name", metavar="RUN_OR_MODEL", help=NAME)
    predict.add_argument("text", nargs="+", help="texts to label; '-' reads one a line from standard input")
    predict.add_argument("--json", action="store_true", help="print one JSON object a line (default: off)")
    predict.add_argument("--journal", metavar="FILE", help=JOURNAL)
    add_options(predict, {"model": MODEL[1:], "task": TASK})


def _predict(arguments) -> int:
    texts = []
    for text in arguments.text:
        texts += [line.strip() for line in sys.stdin if line.strip()] if text == "-" else [text.strip()]
    if not texts or not all(texts):
        raise UserError("no text to label: give it in quotation marks, or '-' and one text a line")
    classifier = opened(arguments)
    if classifier.task.kind == "choice":
        raise UserError("a run that chooses between candidates needs them: `adazeta eval` takes a file that has them")
    if classifier.task.kind == "completion":
        for text, answer in zip(texts, classifier.task.generate(classifier.model, classifier.tokenizer, texts)):
            print(json.dumps({"text": text, "answer": answer}, ensure_ascii=False) if arguments.json else answer)
        return 0
    labels = classifier.task.labels
    for text, probabilities in zip(texts, classifier.probabilities(texts)):
        best = max(range(len(labels)), key=probabilities.__getitem__)
        if arguments.json:
            by_label = dict(zip(labels, probabilities))
            print(json.dumps({"text": text, "label": labels[best], "probabilities": by_label}, ensure_ascii=False))
        else:
            others = "  ".join(f"{label} {p:.3f}" for label, p in zip(labels, probabilities))
            print(f"{labels[best]}  ({others})  {text}")
    return 0
