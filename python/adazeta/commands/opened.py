"""What ``eval`` and ``predict`` have in common: opening what their command line names."""

from __future__ import annotations

from ..options import MODEL, note_unread, resolve, template_settings
from ..options_data import TASK
from . import quiet, say

NAME = "run folder, base model folder, or 'smollm2'"
JOURNAL = "adapter from a journal; RUN_OR_MODEL then is the base model, or a run on it (default: none)"


def named_task(arguments):
    """Return the task of what an eval or predict command names; task flags override the run's own."""
    from ..base_models import architecture, model_folder
    from ..runs import card_for, default_task, own_task
    from ..tasks import choose, to_dict

    flags = vars(arguments)
    named = {name.replace("-", "_") for name in template_settings(flags)}
    given = {option.key for option in TASK if option.key in flags or option.key in named}
    card = card_for(arguments.name, arguments.journal)
    stored = own_task(card, arguments.journal or arguments.name)
    if not given:
        return stored or default_task(card["base_model"], say)
    own = {"task": stored.kind, **to_dict(stored)} if stored else {}
    merged = {**resolve(flags, TASK), **{key: value for key, value in own.items() if key not in given}}
    if merged.get("labels") is None:
        merged["labels"] = template_settings(flags).get("label-names")
    return choose(merged, architecture(model_folder(card["base_model"], say)))


def opened(arguments, task):
    """Open what an eval or predict command names, for its :func:`named_task`."""
    from ..runs import Classifier

    quiet()
    flags = vars(arguments)
    values = resolve(flags, MODEL[1:])
    if values["threads"]:
        import torch

        torch.set_num_threads(values["threads"])
    dtype = None if values["dtype"] == "auto" else values["dtype"]
    stored = {"dtype": dtype, "quantize": values["quantize"], "device": values["device"]}
    classifier = Classifier.open(arguments.name, task=task, **stored, journal=arguments.journal, say=say)
    note_unread(flags, classifier.task.kind, say)
    return classifier


def data_settings(arguments, options: list) -> dict:
    """Return the settings of the data: flags, else those of the run."""
    from ..runs import card_for

    stored = card_for(arguments.name, arguments.journal).get("settings") or {}
    return resolve(vars(arguments), options, stored=stored)
