"""Named recipes: ``paper`` as AdaZeta published it, ``default`` the best measured here (docs/experiments.md)."""

from dataclasses import dataclass, field
from typing import Any

from .schedule import AdaptiveQueries


@dataclass(frozen=True)
class Preset:
    """Keyword arguments for ``TTConfig`` (``tt``), ``ZOConfig`` (``zo``) and ``TrainingArguments`` (``train``).

    ``fitted_lr`` is the learning rate where a head begins fitted (``adazeta.head_start``), None the one of ``train``.
    """

    tt: dict[str, Any] = field(default_factory=dict)
    zo: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    fitted_lr: float | None = None


PRESETS = {
    "default": Preset(
        tt={
            "rank": 3,
            "bottleneck": 8,
            "sites": "paper",
            "act": "identity",
            "bias": False,
            "init": "identity",
            "positions": "last",
            "layers_to_transform": "middle",
        },
        zo={
            "eps": 0.03,
            "queries": 32,
            "directions": "example",
            "difference": "central",
            "combine": "spread",
            "floor": 1e-3,
            "clip": 3.0,
            "momentum": 0.9,
            "distribution": "rademacher",
        },
        train={
            "learning_rate": 0.03,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
            "max_steps": 200,
            "per_device_train_batch_size": 16,
            "weight_decay": 0.0,
            "train_sampling_strategy": "group_by_length",
        },
        fitted_lr=0.005,  # at such a start the head has no gradient left: larger steps lead away from it
    ),
    "paper": Preset(
        tt={"rank": 5, "bottleneck": 64, "sites": "paper", "act": "relu", "bias": True, "init": "identity"},
        zo={
            "eps": 1e-3,
            "queries": AdaptiveQueries(alpha=0.85, beta=0.45, maximum=20),
            "directions": "batch",
            "difference": "central",
            "combine": "mean",
        },
        train={
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 16,
            "weight_decay": 0.01,
        },
    ),
}
