"""Named recipes: ``paper`` as AdaZeta published it, ``default`` the best measured here (docs/guide.md)."""

from dataclasses import dataclass, field
from typing import Any

from .schedule import AdaptiveQueries


@dataclass(frozen=True)
class Preset:
    """Keyword arguments for ``TTConfig`` (``tt``), ``ZOConfig`` (``zo``) and ``TrainingArguments`` (``train``)."""

    tt: dict[str, Any] = field(default_factory=dict)
    zo: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


PRESETS = {
    "paper": Preset(
        tt=dict(rank=5, bottleneck=64, sites="paper", act="relu", bias=True, init="identity"),
        zo=dict(
            eps=1e-3,
            queries=AdaptiveQueries(alpha=0.85, beta=0.45, maximum=20),
            directions="batch",
            difference="central",
            combine="mean",
        ),
        train=dict(learning_rate=1e-4, weight_decay=0.01, per_device_train_batch_size=16, lr_scheduler_type="constant"),
    ),
}
