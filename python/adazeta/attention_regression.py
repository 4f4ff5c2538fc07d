"""Logistic regression on a mean of hidden states whose weights are fitted too.

Of examples ``n`` with hidden states ``h_nt`` at their tokens,

    minimise  mean_n CE(W p_n + b, y_n) + penalty (s^2 |W|^2 + u^2 |a|^2),   p_n = sum_t softmax_t(a . h_nt) h_nt,

with ``s^2`` the mean square of the plain means of the examples, and ``u^2`` that of the hidden states, both less the
mean of all hidden states: ``classes x (width + 1) + width`` numbers, by L-BFGS from 0, where the weights are those of
the plain mean. It is not convex, so the minimum is one that lies downhill from there. With weights ``w_nt`` of the
tokens, ``e_n = softmax(logits_n) - y_n`` and ``c_nt = e_n . W h_nt``, the gradients are

    dW = mean_n e_n p_n^T,   db = mean_n e_n,   da = mean_n sum_t w_nt (c_nt - sum_t w_nt c_nt) h_nt.

Numerics: float32; the bits depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, one_hot

#: From the strongest on, as long as examples left out gain.
PENALTIES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)


@dataclass(frozen=True)
class Tokens:
    """Hidden states of the real tokens of some examples.

    Args:
        states: float32 ``[tokens, width]``, example after example.
        lengths: int64 ``[N]``, tokens of each example, at least 1.
        labels: int64 ``[N]``.
    """

    states: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor

    def of(self, examples: torch.Tensor) -> Tokens:
        """Return the examples that the bools ``[N]`` choose."""
        chosen = examples.repeat_interleave(self.lengths)
        return Tokens(self.states[chosen], self.lengths[examples], self.labels[examples])


def attention_regression(
    tokens: Tokens, classes: int, penalty: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ``a`` ``[width]``, ``W`` ``[classes, width]`` and ``b`` ``[classes]`` of the problem above."""
    lengths, labels = tokens.lengths, tokens.labels
    examples = torch.arange(len(lengths)).repeat_interleave(lengths)
    mean = tokens.states.mean(0)
    h = tokens.states - mean
    tiny = torch.finfo(h.dtype).tiny
    plain = h.new_zeros(len(lengths), h.shape[1]).index_add_(0, examples, h) / lengths[:, None]
    of_means, of_states = (x.square().mean().sqrt().clamp_min(tiny) for x in (plain, h))
    answers = one_hot(labels, classes).to(h.dtype)
    # Numbers of about the same size, W and a times what they multiply, which is easier for the solver.
    weight, bias, scores = h.new_zeros(classes, h.shape[1]), h.new_zeros(classes), h.new_zeros(1, h.shape[1])
    solver = torch.optim.LBFGS([weight, bias, scores], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        products = h @ torch.cat([weight / of_means, scores / of_states]).T
        found, w = products[:, :-1], softmax_by_row(products[:, -1], examples, len(lengths))
        logits = h.new_zeros(len(lengths), classes).index_add_(0, examples, w[:, None] * found)
        error = ((logits + bias).softmax(1) - answers) / len(lengths)
        pull = error[examples]
        c = (pull * found).sum(1)
        c = w * (c - (error * logits).sum(1)[examples])
        gradient = torch.cat([w[:, None] * pull, c[:, None]], 1).T @ h
        weight.grad = gradient[:-1] / of_means + 2 * penalty * weight
        scores.grad = gradient[-1:] / of_states + 2 * penalty * scores
        bias.grad = error.sum(0)
        return cross_entropy(logits + bias, labels) + penalty * (weight.square().sum() + scores.square().sum())

    with torch.no_grad():
        solver.step(loss)
        weight = weight / of_means
        return scores[0] / of_states, weight, bias - weight @ mean


def softmax_by_row(scores: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return the softmax of ``scores`` ``[T]`` over those with the same one of ``count`` ``rows`` ``[T]``."""
    most = scores.new_full((count,), -torch.inf).scatter_reduce_(0, rows, scores, "amax")
    weights = (scores - most[rows]).exp()
    return weights / scores.new_zeros(count).index_add_(0, rows, weights)[rows]


def logits_of(tokens: Tokens, a: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return the logits ``[N, classes]`` of a regression."""
    count = len(tokens.lengths)
    examples = torch.arange(count).repeat_interleave(tokens.lengths)
    w = softmax_by_row(tokens.states @ a, examples, count)
    return bias + a.new_zeros(count, len(bias)).index_add_(0, examples, w[:, None] * (tokens.states @ weight.T))


def best_regression(
    tokens: Tokens, classes: int, folds: int, progress: Callable[[int], object] = lambda done: None
) -> tuple[tuple[torch.Tensor, ...], float]:
    """Return the regression with the penalty that is best on left-out examples, and their mean loss.

    ``PENALTIES`` are tried from the strongest on until one is worse than the one before: weak ones take long.
    ``progress`` is told of those that are done, in the end of all.
    """
    best, penalty = float("inf"), PENALTIES[0]
    for number, candidate in enumerate(PENALTIES):
        loss = _left_out_loss(tokens, classes, candidate, folds)
        if not loss < best:
            progress(len(PENALTIES) - number)
            break
        best, penalty = loss, candidate
        progress(1)
    return attention_regression(tokens, classes, penalty), best


def _left_out_loss(tokens: Tokens, classes: int, penalty: float, folds: int) -> float:
    fold = torch.arange(len(tokens.labels)) % folds
    total = 0.0
    for left_out in range(folds):
        found = attention_regression(tokens.of(fold != left_out), classes, penalty)
        unseen = tokens.of(fold == left_out)
        total += float(cross_entropy(logits_of(unseen, *found), unseen.labels, reduction="sum"))
    return total / len(tokens.labels)
