"""One token per probe against one row per probe, and against dense matrices in float64."""

from functools import wraps

import pytest
import torch
from families import adapted
from tiny import DenseAdapter, dense_float64, lm_batch, tiny_adapted
from torch import nn

from adazeta import ZerothOrder
from adazeta.losses import LabelWords
from adazeta.planner import Planner
from adazeta.probe_tokens import CopiedPrompts, ProbeTokens, can_use_probe_tokens, evaluate_probe_tokens
from adazeta.probes import Plan, evaluate_probes
from adazeta_kernels import perturb_

SIGNS = (1.0, -1.0)


class Words:
    pad_token_id = 0

    def encode(self, text, add_special_tokens):
        return {"good": [5], "bad": [9], "very bad": [4, 9]}[text]


LOSS = LabelWords(Words(), ["good", "bad"])


def prompts(rows=4, tokens=7, left=False):
    batch = lm_batch(rows, tokens)
    if left:
        for row in range(rows):
            shift = tokens - int(batch["attention_mask"][row].sum())
            for key in ("input_ids", "attention_mask"):
                batch[key][row] = batch[key][row].roll(shift)
    return {**batch, "labels": torch.arange(rows) % 2}


def at_tokens(model, plan, batch, **settings):
    return evaluate_probe_tokens(plan, batch, model, LOSS, tt_model=model.base_model, adapter="default", **settings)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("limit", [None, 1, 3, 10])
def test_one_token_per_probe_equals_one_row_per_probe(groups, left, limit):
    model = tiny_adapted(noise=0.3, positions="last")
    batch = prompts(left=left)
    plan = Plan(list(range(3 * groups)), 0.1, SIGNS, groups, 4 // groups)
    expected = evaluate_probes(
        plan, batch, lambda part: LOSS(model, part), tt_model=model.base_model, planner=Planner(probes_per_forward=1)
    )
    losses, rows = at_tokens(model, plan, batch, planner=Planner(probes_per_forward=limit))
    assert losses.shape == expected.shape and expected.std(dim=1).min() > 1e-5
    torch.testing.assert_close(losses, expected, atol=5e-6, rtol=0)
    if limit is None:
        assert rows == 4  # every prompt once


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("column", ["position_ids", "token_type_ids", "a hole in the mask"])
def test_copies_have_what_else_the_batch_says_of_their_token(column, left):
    model = adapted("gpt2", positions="last")
    batch, losses = prompts(left=left), []
    if column == "a hole in the mask":
        batch["attention_mask"][0, 3] = 0
    else:
        batch[column] = 3 + 2 * torch.arange(7).repeat(4, 1)
    for rows_mix in (False, True):  # a copy per probe, or a row
        step = ZerothOrder(model, queries=3)
        step._first_look._done, step._first_look.rows_mix = True, rows_mix
        losses.append(step.estimate(LOSS, batch))
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)


def test_smoothed_labels_at_tokens(monkeypatch):
    monkeypatch.setattr(LOSS, "label_smoothing", 0.2)
    test_one_token_per_probe_equals_one_row_per_probe(groups=1, left=False, limit=None)


class LastTokenDense(DenseAdapter):
    """Float64 stand-in: the dense adapter on one column of the base layer's output."""

    def forward(self, x):
        y = self.base(x).clone()
        y[:, -1] = self.adapt(y[:, -1])
        return y


def dense_last(model, theta):
    base = dense_float64(model, theta, LastTokenDense)
    base._forward_pre_hooks.clear()
    return base


@pytest.mark.parametrize("rows, tokens", [(3, 7), (1, 7), (2, 1)])
def test_probe_tokens_equal_dense_float64(rows, tokens):
    """Also for prompts of a single token."""
    model = tiny_adapted(noise=0.3, positions="last")
    batch = prompts(rows, tokens)
    plan = Plan([1, 2, 3], 0.1, (1.0,), 1, rows)
    losses, _ = at_tokens(model, plan, batch)
    for q, seed in enumerate(plan.seeds):
        theta = model.base_model.theta().clone()
        perturb_([theta], [seed], [0.1])
        dense = dense_last(model, theta)
        for row in range(rows):
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
            with torch.no_grad():
                logits = dense(input_ids=ids).logits[0, -1, [5, 9]]
            expected = nn.functional.cross_entropy(logits[None], batch["labels"][row : row + 1])
            assert float(losses[0, q, 0, row]) == pytest.approx(float(expected), abs=3e-6)


@pytest.mark.parametrize("left", [False, True])
def test_the_models_own_forward_adapts_the_last_real_token(left):
    model = tiny_adapted(noise=0.3, positions="last")
    batch = prompts(left=left)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        scores = LOSS.scores(model, batch)
        for row in range(4):
            real = batch["attention_mask"][row].bool()
            alone = model(input_ids=batch["input_ids"][row][real][None]).logits[0, -1]
            last = int(real.nonzero().max())
            torch.testing.assert_close(logits[row, last], alone, atol=2e-5, rtol=0)
            torch.testing.assert_close(scores[row], alone[[5, 9]], atol=2e-5, rtol=0)
    assert all(layer.focus is None for _, layer in model.base_model.tt_layers("default"))


def test_training_with_probe_tokens_is_training_with_rows():
    """The same seeds, the same update, whether a probe is a token or a row."""
    thetas, counts = [], []
    for loss in (LOSS, lambda model, batch: LOSS(model, batch)):
        model = tiny_adapted(noise=0.3, positions="last")
        opt = ZerothOrder(model, lr=0.05, eps=0.1, queries=3, directions="example")
        for _ in range(3):
            opt.estimate(loss, prompts())
            opt.step()
        thetas.append(model.base_model.theta())
        counts.append((opt.rows, opt.evaluations))
    torch.testing.assert_close(thetas[0], thetas[1], atol=2e-4, rtol=0)
    assert counts == [(12, 72), (72, 72)]


def test_saved_and_loaded_with_positions(tmp_path):
    from peft import PeftModel
    from tiny import tiny_llama

    model = tiny_adapted(noise=0.3, positions="last")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(LOSS.scores(loaded, prompts()), LOSS.scores(model, prompts()))


def test_generation_with_cache_adapts_the_prompts_end_and_what_follows():
    model = tiny_adapted(noise=0.5, positions="last")
    ids = prompts(1)["input_ids"]
    with torch.no_grad():
        out = model.generate(input_ids=ids, max_new_tokens=1, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert int(out[0, -1]) == int(model(input_ids=ids).logits[0, -1].argmax())
        longer = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert longer.shape[1] == ids.shape[1] + 5


def test_backpropagation_reaches_theta_at_the_last_token():
    model = tiny_adapted(noise=0.3, positions="last")
    LOSS(model, prompts()).mean().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert sum(float(g.abs().sum()) > 0 for g in grads) >= len(grads) - 1


def test_probe_order_round_trip():
    x = torch.randn(6, 4, 3)
    for groups in (1, 2, 3, 6):
        tokens = ProbeTokens(4, groups)
        probes = tokens.to_probes(x)
        assert probes.shape == (groups * 4, 6 // groups, 3)
        assert torch.equal(tokens.to_rows(probes), x)
        assert torch.equal(probes[1, 0], x[0, 1])


def test_copies_see_the_prompt_and_themselves():
    ids = torch.tensor([[7, 8, 9, 0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    inputs = CopiedPrompts.of(ids, mask, 2, torch.float32)
    assert inputs.input_ids.tolist() == [[7, 8, 9, 9, 9]]
    assert inputs.position_ids.tolist() == [[0, 1, 2, 2, 2]]
    seen = (inputs.attention_mask[0, 0] == 0).int().tolist()
    assert seen[3] == [1, 1, 0, 1, 0] and seen[4] == [1, 1, 0, 0, 1]
    assert seen[:3] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]


def test_a_model_that_counts_columns_takes_one_row_per_probe():
    """It takes ``position_ids``, as all that may have copies do, and does not look at them."""
    model, batch = tiny_adapted(noise=0.3, positions="last"), prompts()
    assert can_use_probe_tokens(model.base_model, "default", LOSS, batch)
    other = tiny_adapted(noise=0.3, positions="last")
    forward = other.get_base_model().model.forward
    other.get_base_model().model.forward = wraps(forward)(lambda *a, position_ids=None, **more: forward(*a, **more))
    assert not can_use_probe_tokens(other.base_model, "default", LOSS, batch)
    assert can_use_probe_tokens(model.base_model, "default", LOSS, batch)


def test_long_label_words_are_refused():
    long_words = LabelWords(Words(), ["good", "very bad"])
    with pytest.raises(ValueError, match="label words of one token"):
        long_words.scores(tiny_adapted(positions="last"), prompts())
    with pytest.raises(ValueError, match="positions must be one of"):
        tiny_adapted(positions="first")
