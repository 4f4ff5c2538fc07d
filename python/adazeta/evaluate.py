"""Accuracy and loss of a model on examples, without perturbation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .batches import to_device
from .data import row_tokens
from .errors import UserError
from .measures import Measures
from .probes import check_mask


def judge(loss, model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return losses ``[B]``, scores ``[B, C]`` and the class ``[B]`` that would be right.

    A loss without ``scores`` (a completion) has two classes, wrong and right, and right is the right one.

    Raises:
        ValueError: a row without a token.
    """
    check_mask(batch)
    if hasattr(loss, "scores"):
        scores, labels = loss.scores(model, batch), batch["labels"]
        return F.cross_entropy(scores, labels, reduction="none"), scores, labels
    losses, right = loss.judge(model, batch)
    return losses, F.one_hot(right.long(), 2).float(), torch.ones_like(right, dtype=torch.long)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    loss,
    dataset: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
    measures: Measures | None = None,
) -> dict[str, Any]:
    """Return accuracy, mean loss and the prediction of every example, in the order of ``dataset``.

    Examples are evaluated in order of their length, so that little padding is computed.

    Args:
        model: with or without adapters.
        loss: one of :mod:`adazeta.losses` with ``scores`` or ``judge``.
        dataset: examples with ``input_ids`` and ``labels``.
        collate: makes a batch of a list of examples.
        batch_size: examples per forward.
        progress: called with the number of examples done since the last call.
        measures: what else is measured.

    Returns:
        ``accuracy`` and ``loss`` and what ``measures`` has (floats), ``predictions`` (class indices) and
        ``probabilities`` (list of lists). The
        predictions of a completion are 1 where every token of the answer is the likeliest, that is where greedy
        generation gives the answer, else 0.

    Raises:
        UserError: empty dataset.
    """
    if not len(dataset):
        raise UserError("the dataset to evaluate on is empty")
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(dataset)), key=lambda i: row_tokens(dataset[i]))
    found, generates = [], measures is not None and measures.generates
    for first in range(0, len(order), batch_size):
        rows = [dataset[i] for i in order[first : first + batch_size]]
        batch = to_device(collate(rows), device)
        found.append([tensor.cpu() for tensor in judge(loss, model, batch)])
        if progress is not None and not generates:
            progress(len(rows))
    back = torch.empty(len(order), dtype=torch.long)
    back[order] = torch.arange(len(order))
    losses, scores, labels = (torch.cat(parts)[back] for parts in zip(*found))
    predictions = scores.argmax(1)
    further = {}
    if measures is not None:
        rows, in_order = [dataset[i] for i in order], predictions[order].tolist()
        further = measures(model, rows, in_order, collate, batch_size, progress)
    return {
        "accuracy": float((predictions == labels).float().mean()),
        "loss": float(losses.mean()),
        **further,
        "predictions": predictions.tolist(),
        "probabilities": scores.softmax(1).tolist(),
    }
