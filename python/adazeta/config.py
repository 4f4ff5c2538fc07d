"""``ZOConfig``: the settings of the zeroth-order step that ``transformers.TrainingArguments`` has no place for."""

from dataclasses import dataclass
from typing import Any


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
