"""``ZOConfig``: the settings of the zeroth-order step that ``transformers.TrainingArguments`` has no place for."""

import math
from dataclasses import dataclass
from typing import Any

from .estimator import probe_signs


@dataclass
class ZOConfig:
    """Settings of the zeroth-order step; learning rate, schedule, weight decay and batch size are TrainingArguments'.

    Args:
        eps: distance of a probe from theta, in units of the parameters.
        queries: queries per step (and per group): an integer or a schedule such as ``AdaptiveQueries``.
        directions: ``"batch"``, ``"example"`` or a number of groups: who shares a direction.
        difference: ``"central"`` or ``"forward"``.
        combine: ``"mean"`` or ``"spread"``.
        floor: smallest spread that is divided by.
        clip: bound on a projected gradient, in spreads, or None.
        momentum: factor on the running direction, in [0, 1).
        distribution: ``"gaussian"`` or ``"rademacher"``.
        run_seed: 64-bit seed of all directions; None takes ``TrainingArguments.seed``.
        probes_per_forward: most probes in one forward; None chooses by the number of tokens.
        memory_budget: bytes that a forward may take above the weights; None is half of what is free.
        on_divergence: ``"stop"``, ``"rollback"`` or ``"ignore"``: what becomes of a step that the guard refuses.
        share_prefix: run blocks below the first adapter once per example instead of once per probe.
        prefix_cache: what becomes of their outputs after a step: ``"off"``, ``"memory"`` or ``"disk"``, with a limit in
            ``"memory:2GiB"``; ``"auto"`` is memory in runs of more than an epoch.
        perturb: ``"streamed"`` or ``"in-place"``: how trainable parameters that are not adapters are perturbed.
        privacy: an ``adazeta.privacy.Privacy`` for differentially private steps, or None.
    """

    eps: float = 1e-2
    queries: Any = 1
    directions: str | int = "batch"
    difference: str = "central"
    combine: str = "spread"
    floor: float = 0.0
    clip: float | None = None
    momentum: float = 0.0
    distribution: str = "gaussian"
    run_seed: int | None = None
    probes_per_forward: int | None = None
    memory_budget: int | None = None
    on_divergence: str = "stop"
    share_prefix: bool = True
    prefix_cache: str = "auto"
    perturb: str = "streamed"
    privacy: Any = None


def check_update(lr: float, momentum: float, weight_decay: float) -> None:
    """Check the settings of an update; a ``ValueError`` names what is out of its range."""
    if not (0 <= lr < math.inf and 0 <= weight_decay < math.inf and 0 <= momentum < 1):
        raise ValueError(
            f"expected finite lr >= 0, weight_decay >= 0, 0 <= momentum < 1, got {lr=}, {weight_decay=}, {momentum=}"
        )


def check_probes(eps: float, directions: str | int, difference: str, distribution: str, run_seed: int) -> None:
    """Check the settings that decide where the probes are; a ``ValueError`` names what is out of its range."""
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")
    if directions not in ("batch", "example") and not (isinstance(directions, int) and directions >= 1):
        raise ValueError(f"directions must be 'batch', 'example' or a number of groups, got {directions!r}")
    probe_signs(difference)
    if distribution not in ("gaussian", "rademacher"):
        raise ValueError(f"distribution must be 'gaussian' or 'rademacher', got {distribution!r}")
    if not 0 <= run_seed < 2**64:
        raise ValueError(f"run_seed must be in [0, 2**64), got {run_seed}")
