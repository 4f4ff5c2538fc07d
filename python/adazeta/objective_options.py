"""The settings of what is aimed at and what is measured."""

from __future__ import annotations

from adazeta.kinds import metrics, objective, positive
from adazeta.option import Option

MAX_NEW_TOKENS = Option(
    "max-new-tokens", positive, "most tokens of an answer that is generated", 32, tasks=("completion",)
)
MEASURED = [
    Option(
        "metric",
        metrics,
        "measured next to loss and accuracy, separated by commas: f1 (macro average over classes; of answers that of "
        "their words, as for SQuAD) or exact-match (of answers, as for SQuAD)",
        [],
        shown="what --objective names; of a run, what was measured in training",
    ),
    MAX_NEW_TOKENS,
]
OBJECTIVE = [
    Option(
        "objective",
        objective,
        "what training makes better: loss, accuracy, f1, exact-match, or FILE.py:function, your own score(prompt, "
        "completion, reference), higher is better; the file is run",
        "loss",
    ),
    *MEASURED,
]
