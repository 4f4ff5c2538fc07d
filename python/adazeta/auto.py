"""``--eps auto --lr auto``: the settings of a run, measured on its own model and data before it begins."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from adazeta.batches import to_device
from adazeta.calibration import LEVELS, Calibration, Run, measure
from adazeta.data import row_tokens
from adazeta.errors import UserError
from adazeta.options import section
from adazeta.prepare import check_measurable, steps_of, steps_per_epoch, to_measure, with_numbers, zo_config
from adazeta.runs import Classifier

BATCHES, DIRECTIONS = 8, 32


def run_of(settings: Mapping[str, Any], preset: str, examples: int) -> Run:
    """Return the schedule of a run: learning rates and directions of all its steps.

    Args:
        settings: of the run; its eps and lr may be ``auto``.
        preset: what they were resolved with.
        examples: of the training split.

    Raises:
        UserError: a schedule that needs more than its name, or evaluations.
    """
    import torch
    from transformers import get_scheduler

    from adazeta.probes import groups_of
    from adazeta.schedule import as_schedule

    train, zo = section("train", settings, preset), section("zo", settings, preset)
    steps, per_epoch = steps_of(settings, preset, examples), steps_per_epoch(settings, examples)
    warmup = train.get("warmup_steps", 0)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    factors = []
    try:
        scheduler = get_scheduler(
            train.get("lr_scheduler_type", "linear"),
            optimizer,
            num_warmup_steps=math.ceil(steps * warmup) if warmup < 1 else int(warmup),
            num_training_steps=steps,
        )
        for _ in range(steps):
            factors.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    except (TypeError, ValueError) as error:
        raise UserError(f"--lr auto: {' '.join(str(error).split())}; give --lr a number") from error
    queries = as_schedule(zo["queries"])
    groups = groups_of(zo.get("directions", "batch"), settings["batch_size"]) * settings["accumulate"]
    return Run(
        factors=factors,
        directions=[queries(step, per_epoch) * groups for step in range(steps)],
        momentum=zo.get("momentum", 0.0),
        combine=zo.get("combine", "spread"),
        floor=zo.get("floor", 0.0),
    )


def calibrate(
    classifier: Classifier,
    examples: Sequence,
    settings: Mapping[str, Any],
    preset: str,
    *,
    batches: int = BATCHES,
    directions: int = DIRECTIONS,
) -> Calibration:
    """Measure what ``settings`` leave to ``auto``, on batches of training examples that the seed draws.

    Raises:
        UserError: too few examples for a batch, a loss that is not finite, or a gradient that rounding hides.
    """
    from adazeta import ZerothOrder
    from adazeta.progress import progress_bar

    check_measurable(settings)
    rows, size = classifier.encode(examples), settings["batch_size"]
    batches = min(batches, len(rows) // size)
    if not batches or batches * size < 2:
        raise UserError(f"calibration needs a batch of {size} examples (2 at least), the data has {len(rows)}")
    chosen = random.Random(settings["seed"]).sample(range(len(rows)), batches * size)
    # Batches of rows of one length each hold little padding; which rows are drawn does not depend on their length.
    chosen.sort(key=lambda index: row_tokens(rows[index]))
    device = next(classifier.model.parameters()).device
    collate = classifier.collator()
    parts = [[rows[index] for index in chosen[first : first + size]] for first in range(0, len(chosen), size)]
    tensors = [to_device(collate(part), device) for part in parts]
    middle = len(tensors) // 2  # noise and curvature are looked at in the first: of middling length
    tensors.insert(0, tensors.pop(middle))
    zo = {**vars(zo_config(with_numbers(settings, preset), preset)), "prefix_cache": "off"}
    try:
        optimizer = ZerothOrder(classifier.model, **zo)
    except (TypeError, ValueError) as error:
        raise UserError(f"settings: {error}") from error
    numbers = {"eps": optimizer.eps, "lr": section("train", with_numbers(settings, preset), preset)["learning_rate"]}
    given = {name: None if name in to_measure(settings) else number for name, number in numbers.items()}
    total = size * (directions // 4 * (2 * LEVELS + 1) + 2 * directions * len(tensors))
    with progress_bar(total, "calibrate", "losses") as bar:
        return measure(
            optimizer,
            classifier.loss(),
            tensors,
            run_of(settings, preset, len(rows)),
            directions=directions,
            progress=bar.update,
            **given,
        )


def resolve_auto(
    classifier: Classifier, examples: Sequence, settings: Mapping[str, Any], preset: str, say=lambda line: None
) -> dict[str, Any]:
    """Return the settings with numbers in the place of ``auto``, and put both into the classifier's card.

    Raises:
        UserError: as :func:`calibrate`.
    """
    if not (names := to_measure(settings)):
        return dict(settings)
    found = calibrate(classifier, examples, settings, preset)
    numbers = {name: getattr(found, name) for name in names}
    say(f"measured on {found.losses:,} losses: " + ", ".join(f"--{name} {value:g}" for name, value in numbers.items()))
    for warning in found.warnings():
        say(warning)
    classifier.card["settings"].update(numbers)
    classifier.card["calibration"] = found.to_dict()
    return {**settings, **numbers}
