"""The logistic regression that weighs tokens: its minimum, its gradients, and which penalty is taken."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime, minimize
from test_heads import Table

from adazeta import attention_regression as module
from adazeta.attention_regression import Tokens, attention_regression, best_regression, logits_of, softmax_by_row
from adazeta.heads import Pooled


def problem(examples=80, width=4, classes=3, seed=0):
    """Examples of 1 to 6 tokens, of which the one with the largest first number says the class."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (examples,), generator=generator)
    states = 2 + torch.randn(int(lengths.sum()), width, generator=generator)
    labels = []
    for row in states.split(lengths.tolist()):
        labels.append(int(row[row[:, 0].argmax(), 1:].argmax()))
    return Tokens(states, lengths, torch.tensor(labels) % classes)


def objective(tokens, classes, penalty):
    """The problem in float64, as the docstring says it, of the numbers ``[W, b, a]``."""
    states, rows = tokens.states.double().numpy(), tokens.lengths.tolist()
    parts = np.split(states, np.cumsum(rows)[:-1])
    mean = states.mean(0)
    of_means = np.square([part.mean(0) - mean for part in parts]).mean()
    of_states = np.square(states - mean).mean()
    width = states.shape[1]

    def value(numbers):
        weight, bias = numbers[: classes * width].reshape(classes, width), numbers[classes * width :][:classes]
        a, total = numbers[-width:], 0.0
        for part, label in zip(parts, tokens.labels.tolist()):
            scores = part @ a
            w = np.exp(scores - scores.max())
            logits = weight @ (w / w.sum() @ part) + bias
            total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label]
        return total / len(parts) + penalty * (of_means * np.square(weight).sum() + of_states * np.square(a).sum())

    return value


@pytest.mark.parametrize("penalty", [0.3, 0.01])
@pytest.mark.parametrize("classes", [2, 3])
def test_it_is_a_minimum_and_not_above_that_of_another_solver(classes, penalty):
    tokens = problem(classes=classes)
    a, weight, bias = attention_regression(tokens, classes, penalty)
    value = objective(tokens, classes, penalty)
    numbers = torch.cat([weight.flatten(), bias, a]).double().numpy()
    assert np.abs(approx_fprime(numbers, value, 1e-6)).max() < 2e-3
    start = np.zeros(len(numbers))
    best = minimize(value, start, method="L-BFGS-B", options={"maxfun": 10**6, "ftol": 1e-14}).fun
    assert value(numbers) < best + 1e-4 and value(numbers) < math.log(classes)
    assert a.abs().max() > 0.01


def test_logits_are_those_of_the_head_it_is_for():
    model, rows = Pooled(Table(), 3, attention=True).requires_grad_(False), [[1, 2, 3, 4], [5], [6, 7]]
    model.token_scores.weight.normal_(std=2.0)
    ids = torch.tensor([row + [8] * (4 - len(row)) for row in rows])
    states = model.encoder.states.weight[[token for row in rows for token in row]]
    tokens = Tokens(states, torch.tensor([len(row) for row in rows]), torch.zeros(3, dtype=torch.int64))
    found = logits_of(tokens, model.token_scores.weight[0], model.classifier.weight, model.classifier.bias)
    torch.testing.assert_close(found, model(input_ids=ids, attention_mask=(ids != 8).long()).logits)
    chosen = tokens.of(torch.tensor([True, False, True]))
    torch.testing.assert_close(chosen.states, torch.cat([states[:4], states[5:]]))
    assert chosen.lengths.tolist() == [4, 2]


def test_a_softmax_of_every_row():
    scores, rows = torch.tensor([1e4, 0.0, -1e4, 3.0, 3.0]), torch.tensor([0, 0, 1, 2, 2])
    torch.testing.assert_close(softmax_by_row(scores, rows, 3), torch.tensor([1.0, 0.0, 1.0, 0.5, 0.5]))


def test_penalties_from_the_strongest_on_until_one_is_worse(monkeypatch):
    tokens, tried = problem(), []
    losses = {penalty: module._left_out_loss(tokens, 3, penalty, 4) for penalty in module.PENALTIES}
    left_out = module._left_out_loss
    monkeypatch.setattr(module, "_left_out_loss", lambda *all: tried.append(all[2]) or left_out(*all))
    done = []
    found, loss = best_regression(tokens, 3, 4, done.append)
    assert sum(done) == len(module.PENALTIES)
    best = tried[-2] if losses[tried[-1]] > losses[tried[-2]] else tried[-1]
    assert tuple(tried) == module.PENALTIES[: len(tried)] and loss == losses[best] == min(map(losses.get, tried))
    for value, expected in zip(found, attention_regression(tokens, 3, best)):
        torch.testing.assert_close(value, expected)
