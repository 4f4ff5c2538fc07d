"""How many queries a step gets: the paper's growing schedule and a constant one."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ConstantQueries:
    """The same number of queries at every step.

    Args:
        number: queries per step, at least 1.
    """

    number: int = 1

    def __post_init__(self):
        if self.number < 1:
            raise ValueError(f"number of queries must be at least 1, got {self.number}")

    def __call__(self, step: int, steps_per_epoch: int = 1) -> int:
        return self.number


@dataclass(frozen=True)
class AdaptiveQueries:
    """Queries that grow with the epoch index: ``Q_k = min(alpha * e_k ** beta, maximum)``, at least 1.

    ``e_k = floor(k / steps_per_epoch)`` with ``steps_per_epoch = ceil(D / B)`` for D examples in batches of B;
    fractional values are rounded down.

    Args:
        alpha: factor of the power law. Paper, Llama-2-7B: 0.85.
        beta: exponent of the power law. Paper: 0.45.
        maximum: upper bound of the queries per step. Paper: 20.
        by: ``"epoch"`` as in the paper, or ``"step"`` to let ``e_k`` be the step itself.

    Source: AdaZeta (arXiv 2406.18060), equation 5.
    """

    alpha: float = 0.85
    beta: float = 0.45
    maximum: int = 20
    by: str = "epoch"

    def __post_init__(self):
        if self.by not in ("epoch", "step"):
            raise ValueError(f"by must be 'epoch' or 'step', got {self.by!r}")
        if self.maximum < 1 or self.alpha <= 0 or self.beta < 0:
            raise ValueError(
                "expected alpha > 0, beta >= 0 and maximum >= 1, got "
                f"alpha={self.alpha}, beta={self.beta}, maximum={self.maximum}"
            )

    def __call__(self, step: int, steps_per_epoch: int = 1) -> int:
        """Return the queries of step ``step`` (from 0); ``steps_per_epoch`` is the number of batches of an epoch."""
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
        epoch = step if self.by == "step" else step // steps_per_epoch
        return max(1, min(math.floor(self.alpha * epoch**self.beta), self.maximum))


def as_schedule(queries) -> ConstantQueries | AdaptiveQueries:
    """Return ``queries`` as a schedule; an integer means a constant number."""
    if isinstance(queries, bool) or not (isinstance(queries, int) or callable(queries)):
        raise TypeError(f"queries must be an integer or a schedule such as AdaptiveQueries(), got {queries!r}")
    return ConstantQueries(queries) if isinstance(queries, int) else queries
