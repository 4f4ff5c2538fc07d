"""What a model is fine-tuned to do. One file per kind of task.

A task has ``kind`` (its name), ``labels`` (or None where the data's labels are answers), ``encode(tokenizer,
examples)`` (tokens, once), ``loss(model, tokenizer)`` (a float32 loss per row) and is told by its fields alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from adazeta.errors import UserError
from adazeta.tasks.choice import ChoiceTask
from adazeta.tasks.classification import MASK_TEMPLATE, LabelWordTask
from adazeta.tasks.completion import CompletionTask
from adazeta.tasks.head import HeadTask
from adazeta.tasks.prompts import without_last_mask

__all__ = ["ChoiceTask", "CompletionTask", "HeadTask", "LabelWordTask", "Task", "choose", "from_dict", "to_dict"]

Task = LabelWordTask | HeadTask | ChoiceTask | CompletionTask
TASKS: dict[str, type[Task]] = {task.kind: task for task in (LabelWordTask, HeadTask, ChoiceTask, CompletionTask)}


def choose(values: Mapping[str, Any], architecture: str) -> Task:
    """Return the task that settings describe, for a base model of the given architecture.

    Args:
        values: ``task`` (a kind or ``"auto"``: a head for models without a language-model head, else label words) and
            the fields of the task; None takes the task's default. A ``{mask}`` that ends the template stays only where
            the model fills a word in.
        architecture: ``causal``, ``masked``, ``seq2seq``, ``head`` or ``encoder`` (``adazeta.base_models``).

    Raises:
        UserError: fields that a task cannot have, or a head without labels.
    """
    kind = values.get("task") or "auto"
    if kind == "auto":
        kind = HeadTask.kind if architecture in ("head", "encoder") else LabelWordTask.kind
    if kind == LabelWordTask.kind and values.get("template") is None and architecture in ("masked", "seq2seq"):
        values = {**values, "template": MASK_TEMPLATE}
    fills_in = kind == LabelWordTask.kind and architecture in ("masked", "seq2seq")
    if values.get("template") is not None and not fills_in:
        values = {**values, "template": without_last_mask(values["template"])}
    if kind == HeadTask.kind and values.get("labels") is None:
        raise UserError(f"task {kind} needs the labels of its classes: give --labels, or a run that has learned them")
    names = [field.name for field in fields(TASKS[kind])]
    return TASKS[kind](**{name: values[name] for name in names if values.get(name) is not None})


def to_dict(task: Task) -> dict:
    """Return the task as plain JSON values, None left out; :func:`from_dict` is its inverse."""
    values = {field.name: value for field in fields(task) if (value := getattr(task, field.name)) is not None}
    if isinstance(task, LabelWordTask):
        values["label_words"] = dict(task.label_words)
    return {"kind": task.kind, **{name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}}


def from_dict(values: Mapping[str, Any]) -> Task:
    """Return the task of :func:`to_dict`'s values.

    Raises:
        KeyError: an unknown kind, or a missing field.
    """
    task = TASKS[values.get("kind", LabelWordTask.kind)]
    return task(**{f.name: values[f.name] for f in fields(task) if f.name in values or f.default is not None})
