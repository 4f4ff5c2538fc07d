"""What ``eval`` and ``predict`` have in common: opening what their command line names."""

from __future__ import annotations

from ..options import MODEL, note_unread, resolve, template_settings
from ..options_data import TASK
from . import quiet, say

NAME = "run folder, base model folder, or 'smollm2'"
JOURNAL = "adapter from a journal; RUN_OR_MODEL then is the base model, or a run on it (default: none)"


def opened(arguments):
    """Open what an eval or predict command names; task flags override the run's own task."""
    from ..base_models import architecture, model_folder
    from ..runs import Classifier, card_for, own_task
    from ..tasks import choose, to_dict

    quiet()
    flags = vars(arguments)
    named = {name.replace("-", "_") for name in template_settings(flags)}
    given = {option.key for option in TASK if option.key in flags or option.key in named}
    values = resolve(flags, [*MODEL[1:], *TASK])
    task = None
    if given:
        card, own = card_for(arguments.name, arguments.journal), {}
        if stored := own_task(card, arguments.journal or arguments.name):
            own = {"task": stored.kind, **to_dict(stored)}
        merged = {**values, **{key: value for key, value in own.items() if key not in given}}
        if merged.get("labels") is None:
            merged["labels"] = template_settings(flags).get("label-names")
        task = choose(merged, architecture(model_folder(card["base_model"], say)))
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
