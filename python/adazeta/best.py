"""Which evaluation of a run was best, and what follows from it: early stopping, and going back to it at the end."""

import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from .errors import UserError
from .measures import Aim
from .prepare import starts_fitted


def best_metric(settings: Mapping[str, Any], aim: Aim, *, dev: bool, processes: int) -> str | None:
    """Return the key of the dev metric by which a run keeps its best evaluation; None: it keeps the last step.

    A run whose head begins fitted keeps the best unasked, by the loss: with few examples that start is hard to better.

    Args:
        settings: of the run.
        aim: of the run.
        dev: it has dev examples. ``processes``: that train it.

    Raises:
        UserError: no such metric, nothing to measure it on, or several processes.
    """
    if not (settings["keep_best"] or settings["early_stopping"]):
        return "loss" if starts_fitted(settings) and dev and processes == 1 else None
    if processes > 1:
        raise UserError("--keep-best and --early-stopping are for one process")
    if not dev:
        raise UserError("--keep-best and --early-stopping need dev examples: give --dev-data")
    named = [*settings["metric"], *(["score"] if aim.function else [])]
    known = sorted({"accuracy", "loss", *(name.replace("-", "_") for name in named)})
    metric = (settings["keep_best"] or "loss").replace("-", "_")
    if metric not in known:
        raise UserError(f"--keep-best {settings['keep_best']}: expected a metric of dev, {', '.join(known)}")
    return metric


class Best(TrainerCallback):
    """Go back at the end of training to the numbers of the best evaluation, out of the journal, which records it.

    What is known comes from the Trainer's ``log_history``, which checkpoints hold, so a resumed run decides as if it
    had not been stopped. The evaluation before the first step counts.

    Args:
        metric: name of a dev metric, ``loss`` or one that ``compute_metrics`` returns; of a loss the lowest is best, of
            anything else the highest.
        patience: evaluations without a better one after which training ends; None: it runs to its last step.
        waits: tells that training was interrupted and will go on, so that nothing is decided yet.

    Attributes:
        step: steps done at the best evaluation, once training has ended; None where there was none.
    """

    def __init__(self, metric: str, patience: int | None = None, waits=lambda: False):
        self.metric, self.patience, self.waits = metric, patience, waits
        self.step: int | None = None

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        found = self._found(state)
        if self.patience is not None and len(found) - 1 - self._best(found) >= self.patience:
            control.should_training_stop = True

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        found = self._found(state)
        if not found or self.waits():
            return
        self.step = found[self._best(found)][0]
        getattr(optimizer, "optimizer", optimizer).go_back(self.step)

    def _found(self, state) -> list[tuple[int, float]]:
        """Return step and value of every evaluation, in order."""
        name = f"eval_{self.metric}"
        return [(line["step"], line[name]) for line in state.log_history if name in line]

    def _best(self, found: list[tuple[int, float]]) -> int:
        """Return the index of the first of the best values; a NaN is worse than any number."""
        sign = 1 if self.metric.endswith("loss") else -1
        return min(range(len(found)), key=lambda i: sign * found[i][1] if found[i][1] == found[i][1] else math.inf)
