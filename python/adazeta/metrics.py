"""Accuracy, F1 and exact match: of classes, and of answers in words.

F1 of classes is the macro average, as ``torchmetrics`` has it. Exact match and F1 of answers are those of SQuAD, from
``torchmetrics`` too: lower case, without punctuation, articles and superfluous spaces, against the best reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch


def macro_f1(predictions: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return the mean over classes of ``2 TP / (2 TP + FP + FN)``, of every sample of predictions on its own.

    Args:
        predictions: class indices ``[N, R]``: N samples of R examples each.
        labels: the right classes, of the same shape.
        classes: their number C, at least 2; of one sample, those that are neither predicted nor right do not count.

    Returns:
        ``[N]`` float32 in [0, 1].

    Raises:
        ValueError: shapes that differ, or a class beyond C.

    Source: ``torchmetrics.functional.classification.multiclass_f1_score(average="macro")``.
    """
    from torchmetrics.functional.classification import multiclass_f1_score

    if predictions.shape != labels.shape or predictions.ndim != 2 or predictions.numel() == 0:
        raise ValueError(
            f"expected predictions and labels of one shape [samples, examples], got {tuple(predictions.shape)} and "
            f"{tuple(labels.shape)}"
        )
    found = torch.stack((predictions, labels))
    if int(found.min()) < 0 or int(found.max()) >= classes:
        raise ValueError(f"expected classes from 0 to {classes - 1}, got {int(found.min())} to {int(found.max())}")
    return multiclass_f1_score(
        predictions.long(),
        labels.long(),
        num_classes=classes,
        average="macro",
        multidim_average="samplewise",
        validate_args=False,
    ).float()


def exact_match(answer: str, reference: str | Sequence[str]) -> float:
    """Return 1.0 if the answer is a reference, up to case, punctuation, articles and spaces, else 0.0.

    Args:
        answer: what a model said.
        reference: what is right, or several such; the best one counts.

    Raises:
        ValueError: no reference.

    Source: Rajpurkar et al. 2016 (SQuAD 1.1's evaluation script), by ``torchmetrics``.
    """
    return _squad(answer, _references(reference))[0]


def token_f1(answer: str, reference: str | Sequence[str]) -> float:
    """Return the F1 of the answer's words with a reference's, as bags: ``2 P R / (P + R)``, in [0, 1].

    Words are those that :func:`exact_match` compares; without any on both sides the score is 1 (SQuAD 2.0).

    Args, Raises and Source: as for :func:`exact_match`.
    """
    return max(_squad(answer, _references(reference)))


#: Scores of one answer, by the name that ``--objective`` and ``--metric`` give them.
ANSWER_METRICS: dict[str, Callable[[str, str | Sequence[str]], float]] = {"f1": token_f1, "exact-match": exact_match}


def _references(reference: str | Sequence[str]) -> tuple[str, ...]:
    references = (reference,) if isinstance(reference, str) else tuple(reference)
    if not references or not all(isinstance(text, str) for text in references):
        raise ValueError(f"expected a text or several as the reference, got {reference!r}")
    return references


@lru_cache(maxsize=4096)  # most probes of a prompt say the same
def _squad(answer: str, references: tuple[str, ...]) -> tuple[float, float]:
    """Return exact match and F1."""
    from torchmetrics.functional.text import squad

    answers = {"text": list(references), "answer_start": [0] * len(references)}  # where it stands is not looked at
    found = squad([{"prediction_text": answer, "id": "0"}], [{"answers": answers, "id": "0"}])
    return float(found["exact_match"]) / 100, float(found["f1"]) / 100
