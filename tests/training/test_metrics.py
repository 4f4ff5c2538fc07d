"""Accuracy, F1 and exact match, against their definitions."""

import pytest
import torch

from adazeta.metrics import exact_match, macro_f1, token_f1


@pytest.mark.parametrize(
    "answer, reference, match, f1",
    [
        ("The cat.", "cat", 1, 1),
        ("a  Cat!", "the cat", 1, 1),
        ("cats", "cat", 0, 0),
        ("a black cat sat", "cat sat down", 0, 2 * (2 / 3) * (2 / 3) / (4 / 3)),
        ("cat cat", "cat", 0, 2 * 0.5 * 1 / 1.5),  # bags: the second is one too many
        ("", "cat", 0, 0),
        ("the", "", 1, 1),  # no words on either side
        ("dog", ["cat", "a dog"], 1, 1),
        ("black dog", ["cat", "dog", "black cat and dog"], 0, 2 * (2 / 2) * (2 / 4) / 1.5),
    ],
)
def test_answers(answer, reference, match, f1):
    assert exact_match(answer, reference) == match
    assert token_f1(answer, reference) == pytest.approx(f1)


@pytest.mark.parametrize("reference", [[], 3, [1, 2]])
def test_an_answer_needs_a_reference(reference):
    with pytest.raises((ValueError, TypeError)):
        token_f1("a cat", reference)


def by_definition(predictions: list[int], labels: list[int]) -> float:
    scores = []
    for c in set(predictions) | set(labels):
        right = sum(p == label == c for p, label in zip(predictions, labels))
        wrong = sum((p == c) != (label == c) for p, label in zip(predictions, labels))
        scores.append(2 * right / (2 * right + wrong))
    return sum(scores) / len(scores)


def test_macro_f1_of_every_sample():
    g = torch.Generator().manual_seed(0)
    predictions, labels = (torch.randint(0, 4, (6, 9), generator=g) for _ in range(2))
    predictions[0], labels[1] = labels[0], 2  # all right; classes that do not occur
    found = macro_f1(predictions, labels, classes=5)
    expected = [by_definition(p, y) for p, y in zip(predictions.tolist(), labels.tolist())]
    assert found.tolist() == pytest.approx(expected)
    assert found[0] == 1 and len({round(x, 4) for x in expected}) > 3


@pytest.mark.parametrize(
    "predictions, labels, message",
    [([[0, 1]], [[0]], "one shape"), ([[0, 2]], [[0, 1]], "from 0 to 1, got 0 to 2"), ([[-1]], [[0]], "from 0 to 1")],
)
def test_macro_f1_of_wrong_classes(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        macro_f1(torch.tensor(predictions), torch.tensor(labels), classes=2)
