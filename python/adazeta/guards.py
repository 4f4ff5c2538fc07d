"""When a step is refused: losses that are no numbers, or projected gradients that explode."""

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median

import numpy as np

from .update import Step

_MOST = float(np.finfo(np.float32).max)
# No number of a direction is as far from 0: sqrt(48 ln 2) = 5.77 (docs/perturbation-spec.md, section 3).
_FARTHEST = 6.0
POLICIES = ("stop", "rollback", "ignore")


@dataclass
class Guard:
    """Watch the steps of a run, and say which one must not be made and where to go back to.

    A step is refused when its spread is ``factor`` times the median of the last ``window`` accepted ones, when
    ``patience`` steps in a row had no finite loss, or when an update is beyond float32. What it knows comes from the
    steps alone, so a run that is resumed from its journal decides as if it had not been stopped.

    Args:
        policy: ``"stop"`` ends the run at a refused step, ``"rollback"`` goes back to the best point of the journal and
            on with half the learning rate, ``"ignore"`` makes any step that can be made.
        factor: how many times the median spread is an explosion.
        window: steps that the median and the mean loss of a point are taken over; the first half are never refused.
        patience: steps without any finite loss that are tolerated in a row.
        rollbacks: most times that the run may go back.

    Raises:
        ValueError: an unknown policy.
    """

    policy: str = "stop"
    factor: float = 100.0
    window: int = 32
    patience: int = 8
    rollbacks: int = 8
    went_back: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    _spreads: deque = field(default_factory=deque)
    _losses: deque = field(default_factory=deque)
    _silent: int = 0
    _momentum: float = 0.0  # bound on every number of the running direction, that of any step that was made

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise ValueError(f"on_divergence must be one of {POLICIES}, got {self.policy!r}")

    @property
    def lr_factor(self) -> float:
        """Factor on the learning rate: every rollback halves it."""
        return 0.5**self.went_back

    def objection(self, step: Step) -> str:
        """Return why ``step`` must not be made, or ``""``."""
        reach = self._reach(step)
        if not all(size <= _MOST for size in (reach, step.lr * reach, step.lr * step.weight_decay)):
            return f"its update is beyond float32 (lr {step.lr:g}, spread {step.spread:g})"
        if self.policy == "ignore":
            return ""
        if math.isnan(step.loss) and self._silent + 1 >= self.patience:
            return f"no loss of {self._silent + 1} steps in a row is finite"
        if len(self._spreads) >= self.window // 2:
            usual = median(self._spreads)
            if step.spread > self.factor * usual > 0:
                return f"the projected gradients' spread {step.spread:.3g} is {step.spread / usual:.0f} times the usual"
        return ""

    def observe(self, step: Step) -> None:
        """Take note of a step that was made, live or from the journal."""
        if step.back_to is not None:
            self.went_back += bool(step.losses)  # going back to the best evaluation is no divergence, and has none
            self._spreads.clear()
            self._losses.clear()
            self._silent = 0
            return
        self._momentum = max(self._momentum, self._reach(step))
        silent = math.isnan(step.loss)
        if step.spread or not silent:  # a private step has a spread, and tells no loss
            self._keep(self._spreads, step.spread)
        if silent:
            self._silent += 1
            return
        self._silent = 0
        self._keep(self._losses, step.loss)
        # The losses were measured before the step: so was the point that they speak for.
        if len(self._losses) >= self.window // 2 and fmean(self._losses) < self.best_loss:
            self.best_step, self.best_loss = step.index, fmean(self._losses)

    def _keep(self, values: deque, value: float) -> None:
        values.append(value)
        if len(values) > self.window:
            values.popleft()

    def _reach(self, step: Step) -> float:
        """Return a bound on every number of the direction that ``step`` takes, its momentum included."""
        own = _FARTHEST * float(np.abs(np.asarray(step.coefficients, np.float64)).sum())
        return own + step.momentum * self._momentum
