"""Where a head begins: at the logistic regression on what the frozen model makes of the examples.

The last linear layer of a head gives ``logits = W h + b``. Its inputs ``h`` do not depend on ``W`` and ``b``, so
forwards over the examples, once, are all that the best ``W`` and ``b`` for the model as it stands need:

    minimise  mean_n CE(W h_n + b, y_n) + penalty s^2 |W|^2,

with ``s^2`` the mean square of ``h`` less its mean (of ``h`` itself for a layer without ``b``): a convex problem of
``classes x (width + 1)`` numbers, by L-BFGS. The penalty is the one of ``PENALTIES`` whose fits of four fifths of the
examples have the least loss on the last fifth, over all five. Zeroth-order steps go on from there, on adapters and head
together: what they would need most of their queries for is there when they begin.

A head that weighs tokens (:class:`adazeta.heads.Pooled`) begins where those weights are fitted with it
(:mod:`adazeta.attention_regression`).

Numerics: features and fit in float32; the bits depend on the number of threads, as those of any product. A run's
journal keeps the numbers it begins with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from adazeta.batches import to_device
from adazeta.data import row_tokens
from adazeta.errors import UserError
from adazeta.forwards import forward_of
from adazeta.heads import head_modules
from adazeta.prepare import starts_fitted
from adazeta.progress import progress_bar
from adazeta.scoring import language_model

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
#: Most examples that are looked at, and most numbers of hidden states that are kept of them, where tokens are weighed.
MOST_ROWS = 4096
MOST_NUMBERS = 1 << 26
FOLDS = 5


def fit_head(classifier, examples: Sequence[Any], *, batch_size: int = 32, progress=lambda rows: None) -> float | None:
    """Put the logistic regression on the frozen model's features in the place of the head's last layer.

    Args:
        classifier: of a task with a head; its adapter is the identity.
        examples: labelled; the first ``MOST_ROWS`` count.
        batch_size: rows of a forward.
        progress: told of the rows that are done.

    Returns:
        The mean loss on examples that a fit did not see; None where the head was left as it is, for fewer examples than
        folds, or features that are not finite.

    Raises:
        UserError: the head's logits are not those of a linear layer.
    """
    rows = classifier.encode(examples[:MOST_ROWS])
    if len(rows) < FOLDS:
        return None
    last = _last_layer(classifier.model, len(classifier.task.labels))
    if (scores := getattr(language_model(classifier.model), "token_scores", None)) is not None:
        return _fit_attention(classifier, _trained_linears(scores)[0], last, rows, batch_size, progress)
    features, labels = _features(classifier, last, rows, batch_size, progress)
    if not torch.isfinite(features).all():
        return None
    biased = last.bias is not None
    penalty, loss = best_penalty(features, labels, last.out_features, biased)
    weight, bias = logistic_regression(features, labels, last.out_features, penalty, biased)
    with torch.no_grad():
        last.weight.copy_(weight)
        if biased:
            last.bias.copy_(bias)
    return loss


def start_head(classifier, examples: Sequence[Any], settings: Mapping[str, Any], say=lambda line: None) -> None:
    """Fit the head of a new run, where :func:`adazeta.prepare.starts_fitted` says so."""
    if not starts_fitted(settings):
        return
    with progress_bar(min(len(examples), MOST_ROWS), "fit head", "rows") as bar:
        loss = fit_head(classifier, examples, batch_size=settings["eval_batch_size"], progress=bar.update)
    say(
        "head begins as it came: too few examples, or features that are not finite"
        if loss is None
        else f"head begins as logistic regression on the frozen model's features: loss {loss:.3f} on examples left out"
    )


def logistic_regression(
    features: torch.Tensor, labels: torch.Tensor, classes: int, penalty: float, biased: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``W`` ``[classes, width]`` and ``b`` ``[classes]`` of the problem above, ``b = 0`` unless ``biased``.

    Args:
        features: float32 ``[N, width]``.
        labels: int64 ``[N]``, below ``classes``; a class without an example gets a low ``b`` and no direction.
        classes, penalty, biased: see above.
    """
    # Around their mean and by their size: the problem is then as easy for any model, and `W` and `b` are turned back.
    mean = features.mean(0) if biased else torch.zeros_like(features[0])
    size = (features - mean).square().mean().sqrt().clamp_min(torch.finfo(features.dtype).tiny)
    x = (features - mean) / size
    weight, bias = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")
    answers = nn.functional.one_hot(labels, classes).to(x.dtype)

    def loss() -> torch.Tensor:
        logits = x @ weight.T + bias
        error = (logits.softmax(1) - answers) / len(x)
        weight.grad = error.T @ x + 2 * penalty * weight
        bias.grad = error.sum(0) * biased
        return cross_entropy(logits, labels) + penalty * weight.square().sum()

    with torch.no_grad():
        solver.step(loss)
        weight = weight / size
        return weight, bias - weight @ mean


def best_penalty(
    features: torch.Tensor, labels: torch.Tensor, classes: int, biased: bool = True
) -> tuple[float, float]:
    """Return the one of ``PENALTIES`` with the least mean loss on examples left out, and that loss."""
    losses = [_left_out_loss(features, labels, classes, penalty, biased) for penalty in PENALTIES]
    return PENALTIES[losses.index(min(losses))], min(losses)


def _left_out_loss(features: torch.Tensor, labels: torch.Tensor, *problem) -> float:
    fold = torch.arange(len(labels)) % FOLDS
    total = 0.0
    for left_out in range(FOLDS):
        seen, unseen = fold != left_out, fold == left_out
        weight, bias = logistic_regression(features[seen], labels[seen], *problem)
        total += float(cross_entropy(features[unseen] @ weight.T + bias, labels[unseen], reduction="sum"))
    return total / len(labels)


def _last_layer(model: nn.Module, classes: int) -> nn.Linear:
    """Return the last linear layer of the head that trains."""
    inner = language_model(model)
    heads = map(inner.get_submodule, head_modules(inner))
    found = [layer for head in heads for layer in _trained_linears(head) if layer.out_features == classes]
    if not found:
        raise UserError(
            f"--head-start fitted: the head of {type(inner).__name__} has no linear layer of {classes} classes at its "
            "end; use --head-start random"
        )
    return found[-1]


def _trained_linears(module: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of a module of the head that train: those of the adapter, not those it stands for."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear) and layer.weight.requires_grad]


def _fit_attention(classifier, scores: nn.Linear, last: nn.Linear, rows, batch_size: int, progress) -> float | None:
    """Put the regression that weighs tokens in the place of ``scores`` and ``last``; return as :func:`fit_head`."""
    from adazeta.attention_regression import PENALTIES, best_regression

    tokens = _tokens(classifier, rows, batch_size, progress)
    if len(tokens.labels) < FOLDS or not torch.isfinite(tokens.states).all():
        return None
    with progress_bar(len(PENALTIES), "weigh tokens", "penalties") as bar:
        found, loss = best_regression(tokens, last.out_features, FOLDS, bar.update)
    with torch.no_grad():
        for parameter, value in zip((scores.weight, last.weight, last.bias), found):
            parameter.copy_(value.view_as(parameter))
    return loss


@torch.no_grad()
def _features(classifier, last: nn.Linear, rows, batch_size: int, progress) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``last`` reads for every row, float32 ``[N, width]``, and the labels ``[N]``, both on the CPU."""
    loss, collate = classifier.loss(), classifier.collator()
    order = sorted(range(len(rows)), key=lambda index: row_tokens(rows[index]))  # little padding
    features, labels = None, torch.empty(len(rows), dtype=torch.int64)
    with forward_of(last, lambda forward, h: h):  # the model's logits are then what the layer reads, where it scores
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            batch = to_device(collate([rows[index] for index in part]), last.weight.device)
            found = loss.scores(classifier.model, batch).cpu()
            features = found.new_empty(len(rows), found.shape[1]) if features is None else features
            features[part], labels[part] = found, batch["labels"].cpu()
            progress(len(part))
    return features, labels


@torch.no_grad()
def _tokens(classifier, rows, batch_size: int, progress):
    """Return the hidden states of the first rows, as many as ``MOST_NUMBERS`` hold, on the CPU."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    from adazeta.attention_regression import Tokens

    model, kept = language_model(classifier.model), []

    def keep(forward, **inputs):
        states, real = model.states(**inputs)
        kept.append((states[real].float().cpu(), real.sum(1).cpu(), batch["labels"].cpu()))
        return SequenceClassifierOutput(logits=states.new_zeros(len(states), 1))

    loss, collate, room = classifier.loss(), classifier.collator(), MOST_NUMBERS
    width, device = model.width, next(model.parameters()).device
    with forward_of(model, keep):
        for first in range(0, len(rows), batch_size):
            part = range(first, min(first + batch_size, len(rows)))
            room -= width * sum(row_tokens(rows[index]) for index in part)
            if room < 0 and first:
                progress(len(rows) - first)
                break
            batch = to_device(collate([rows[index] for index in part]), device)
            loss.scores(classifier.model, batch)
            progress(len(part))
    return Tokens(*map(torch.cat, zip(*kept)))
