"""Accuracy and loss of a classifier by label words, without perturbation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .errors import UserError
from .losses import LabelWords


@torch.no_grad()
def evaluate_classification(
    model: torch.nn.Module,
    label_words: LabelWords,
    dataset: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Return accuracy, mean loss and the prediction of every example, in the order of ``dataset``.

    Examples are evaluated in order of their length, so that little padding is computed.

    Args:
        model: a causal language model, with or without adapters.
        label_words: the scores.
        dataset: examples with ``input_ids`` and ``labels``.
        collate: makes a batch of a list of examples.
        batch_size: examples per forward.
        progress: called with the number of examples done since the last call.

    Returns:
        ``accuracy`` and ``loss`` (floats), ``predictions`` (class indices) and ``probabilities`` (list of lists).

    Raises:
        UserError: empty dataset.
    """
    if not len(dataset):
        raise UserError("the dataset to evaluate on is empty")
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(dataset)), key=lambda i: len(dataset[i]["input_ids"]))
    scores = torch.empty(len(dataset), len(label_words.words))
    labels = torch.empty(len(dataset), dtype=torch.long)
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        batch = {k: v.to(device) for k, v in collate([dataset[i] for i in indices]).items()}
        scores[indices] = label_words.scores(model, batch).cpu()
        labels[indices] = batch["labels"].cpu()
        if progress is not None:
            progress(len(indices))
    predictions = scores.argmax(1)
    return {
        "accuracy": float((predictions == labels).float().mean()),
        "loss": float(F.cross_entropy(scores, labels)),
        "predictions": predictions.tolist(),
        "probabilities": scores.softmax(1).tolist(),
    }
