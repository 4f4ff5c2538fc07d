"""A head begins as the logistic regression on what the frozen model makes of the examples."""

import math

import numpy as np
import peft
import pytest
import torch
from families import build
from scipy.optimize import minimize
from transformers import AutoModel, AutoModelForSequenceClassification

from adazeta import TTConfig
from adazeta.attention_regression import best_regression
from adazeta.data import Example
from adazeta.errors import UserError
from adazeta.head_start import FOLDS, fit_head, logistic_regression, start_head
from adazeta.heads import Pooled, head_modules
from adazeta.prepare import starts_fitted, with_fitted_lr
from adazeta.presets import PRESETS
from adazeta.tasks import HeadTask

CLASSES = ("bad", "fair", "good")


def problem(rows, width, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = 3 + 0.2 * torch.randn(rows, width, generator=generator)
    directions = torch.randn(width, classes, generator=generator)
    labels = ((features - 3) @ directions + torch.randn(rows, classes, generator=generator)).argmax(1)
    return features, labels


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
@pytest.mark.parametrize("classes, biased", [(2, True), (5, True), (3, False)])
def test_logistic_regression_is_the_minimum(penalty, classes, biased):
    features, labels = problem(200, 6, classes)
    x, y = features.double().numpy(), labels.numpy()
    size = np.square(x - x.mean(0) * biased).mean()

    def objective(numbers):
        weight, bias = numbers[:-classes].reshape(classes, -1), numbers[-classes:]
        logits = x @ weight.T + bias * biased
        top = logits.max(1)
        total = top + np.log(np.exp(logits - top[:, None]).sum(1))
        return (total - logits[np.arange(len(y)), y]).mean() + penalty * size * np.square(weight).sum()

    weight, bias = logistic_regression(features, labels, classes, penalty, biased)
    found = objective(torch.cat([weight.flatten(), bias]).double().numpy())
    options = {"maxiter": 5000, "maxfun": 10**6, "ftol": 1e-15, "gtol": 1e-10}
    best = minimize(objective, np.zeros(classes * 7), method="L-BFGS-B", options=options).fun
    assert best - 1e-6 <= found < best + 1e-4 < math.log(classes)
    assert biased or not bias.any()


def test_a_class_without_examples_and_features_that_do_not_vary():
    features, labels = problem(60, 4, 2)
    weight, bias = logistic_regression(features, labels, 3, 1e-2)
    assert (features @ weight.T + bias)[:, 2].max() < (features @ weight.T + bias)[:, :2].amax(1).min()
    weight, bias = logistic_regression(torch.ones(9, 4), torch.tensor([0] * 6 + [1] * 3), 2, 1e-2)
    shares = (torch.ones(1, 4) @ weight.T + bias).softmax(1)
    torch.testing.assert_close(shares, torch.tensor([[2 / 3, 1 / 3]]), atol=1e-3, rtol=0)


class Letters:
    """Token ids of a text: one per letter."""

    pad_token_id = 0

    def __call__(self, texts, **_):
        return {"input_ids": [[3 + ord(letter) % 20 for letter in text] for text in texts]}


def classifier(kind):
    if kind in ("mean", "attention"):
        base = Pooled(build("bert", AutoModel), len(CLASSES), attention=kind == "attention")
    else:
        base = build(kind, AutoModelForSequenceClassification, num_labels=len(CLASSES))
    config = TTConfig(rank=2, bottleneck=8, sites="paper", modules_to_save=head_modules(base))
    model = peft.get_peft_model(base.eval(), config).eval()
    task = HeadTask(CLASSES)
    from adazeta.runs import Classifier

    return Classifier(model, Letters(), task, {})


def examples(rows=60):
    marks = {"bad": "aa", "fair": "ff", "good": "kk"}
    return [Example(f"{'xyzw' * (1 + n % 3)}{marks[CLASSES[n % 3]]}", CLASSES[n % 3]) for n in range(rows)]


@pytest.mark.parametrize("kind", ["mean", "attention", "bert", "roberta", "llama", "gpt2"])
def test_the_model_then_scores_what_was_fitted(kind):
    it, rows, done = classifier(kind), examples(), []
    before = it.evaluate(rows)
    names = {name: value.clone() for name, value in it.model.state_dict().items()}
    held_out = fit_head(it, rows, batch_size=7, progress=done.append)
    after = it.evaluate(rows)
    assert sum(done) == len(rows)
    assert after["accuracy"] > max(0.9, before["accuracy"]) and max(held_out, after["loss"]) < before["loss"]
    changed = {name for name, value in it.model.state_dict().items() if not torch.equal(value, names[name])}
    assert len(changed) in ((3,) if kind == "attention" else (1, 2)) and all(
        "modules_to_save" in name for name in changed
    )
    assert all("forward" not in vars(module) for module in it.model.modules())


def test_of_weighed_tokens_as_many_are_kept_as_memory_allows(monkeypatch):
    it, rows, done = classifier("attention"), examples(), []
    tokens = sum(len(row.text) for row in rows[:21])
    monkeypatch.setattr("adazeta.head_start.MOST_NUMBERS", tokens * it.model.config.hidden_size)
    seen = []
    monkeypatch.setattr(
        "adazeta.attention_regression.best_regression",
        lambda tokens, *more: seen.append(tokens) or best_regression(tokens, *more),
    )
    assert fit_head(it, rows, batch_size=7, progress=done.append) is not None
    assert sum(done) == len(rows) and len(seen[0].states) == tokens and len(seen[0].labels) == 21
    assert fit_head(it, examples(FOLDS - 1)) is None


def test_too_few_examples_leave_it_alone(capsys):
    it = classifier("mean")
    before = [p.clone() for p in it.model.parameters()]
    assert fit_head(it, examples(FOLDS - 1)) is None
    assert all(torch.equal(a, b) for a, b in zip(before, it.model.parameters()))


@pytest.mark.parametrize(
    "settings, fitted",
    [({}, True), ({"head_start": "random"}, False), ({"dp_noise": 1.0}, False), ({"dp_epsilon": 8.0}, False)],
)
def test_when_it_is_fitted(settings, fitted):
    it, said = classifier("mean"), []
    settings = {
        "task": "head",
        "head_start": None,
        "dp_noise": None,
        "dp_epsilon": None,
        "eval_batch_size": 8,
        **settings,
    }
    start_head(it, examples(), settings, said.append)
    assert len(said) == fitted == starts_fitted(settings)
    assert not starts_fitted({**settings, "task": "label-words"})


def test_the_learning_rate_of_a_fitted_head():
    rates = PRESETS["default"]
    own, fitted = rates.train["learning_rate"], rates.fitted_lr
    settings = {"task": "head", "head_start": None, "dp_epsilon": None, "dp_noise": None, "lr": own}
    for more, given, preset, expected in (
        ({}, (), "default", fitted),
        ({}, ("lr",), "default", own),
        ({"lr": 0.02}, (), "default", 0.02),  # from Python, or of a dataset template
        ({"lr": "auto"}, (), "default", "auto"),
        ({"head_start": "random"}, (), "default", own),
        ({"dp_noise": 1.0}, (), "default", own),
        ({"task": "label-words"}, (), "default", own),
        ({"lr": 1e-4}, (), "paper", 1e-4),
    ):
        assert with_fitted_lr({**settings, **more}, preset, given)["lr"] == expected
    assert fitted < own


def test_a_head_without_a_last_linear_layer():
    it = classifier("mean")
    head = it.model.get_base_model().classifier
    head.modules_to_save["default"] = torch.nn.Sequential(torch.nn.Tanh())
    with pytest.raises(UserError, match="Pooled has no linear layer of 3 classes at its end; use --head-start random"):
        fit_head(it, examples())
