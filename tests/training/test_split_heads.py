"""Heads that run probe by probe inside one forward, against one probe per forward."""

from contextlib import ExitStack

import pytest
import torch
from families import MASKED, adapted, build
from peft import get_peft_model
from test_word_losses import prompts
from tiny import moved
from transformers import AutoModel, AutoModelForSequenceClassification

from adazeta import TTConfig, ZerothOrder, split_heads
from adazeta.block_ends import BlockEnds
from adazeta.forwards import forward_of
from adazeta.heads import Pooled, head_modules
from adazeta.losses import HeadScores
from adazeta.split_heads import heads_of
from adazeta.streamed import Streamed

OURS = ("mean", "attention")


real = Streamed.of_probes


def with_head(family, **config):
    auto = AutoModelForSequenceClassification
    return adapted(family, auto=auto, modules_to_save=head_modules(build(family, auto)), **config)


def pooled(how, **config):
    torch.manual_seed(1)
    base = Pooled(build("bert", AutoModel), 3, attention=how == "attention").requires_grad_(False).eval()
    config = TTConfig(rank=2, bottleneck=8, modules_to_save=head_modules(base), **config)
    return get_peft_model(base, config).eval()


def coefficients_of(model, ends=None, **settings):
    """Forwards of the trunk, and projected gradients, of one estimate."""
    opt = ZerothOrder(model, eps=0.1, queries=3, directions="example", **settings)
    opt.ends = ends or opt.ends
    inner, calls = model.get_base_model(), []
    trunk = inner.encoder if isinstance(inner, Pooled) else inner.base_model
    before = {name: p.clone() for name, p in model.named_parameters()}
    opt.estimate(HeadScores(), prompts())  # the first one looks at the model too
    opt.zero_grad()
    handle = trunk.register_forward_pre_hook(lambda *a: calls.append(1))
    opt.estimate(HeadScores(), prompts())
    handle.remove()
    if "perturb" not in settings:
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    return len(calls), torch.cat(opt._projected)


FAMILIES = (*MASKED, "gpt2", "llama", *OURS)


def model_of(family, **config):
    return pooled(family, **config) if family in OURS else with_head(family, **config)


@pytest.mark.parametrize("family", FAMILIES)
def test_many_probes_in_a_forward_equal_one(family):
    model = model_of(family)
    forwards, together = coefficients_of(model, probes_per_forward=30)
    assert forwards == 1
    forwards, alone = coefficients_of(model, probes_per_forward=1)
    assert forwards == 30
    torch.testing.assert_close(together, alone, atol=3e-4, rtol=1e-3)
    assert alone.std() > 0.01
    _, in_place = coefficients_of(model, perturb="in-place")
    torch.testing.assert_close(together, in_place, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_below_the_first_adapter_run_once_per_example(family, block):
    """In the last block too, above blocks that are shared whole; also where a forward holds a few probes."""
    model = moved(model_of(family, layers_to_transform=[block]), 0.3)
    ends, off = BlockEnds(model, model.base_model, "default"), BlockEnds(torch.nn.Identity(), None, "default")
    for settings in ({}, {"probes_per_forward": 4}):
        plain, shared = (coefficients_of(model, ends=used, **settings)[1] for used in (off, ends))
        torch.testing.assert_close(shared, plain, atol=3e-4, rtol=1e-3)
    assert plain.std() > 0.01
    assert len(ends.below) >= 2 * (1 + block) and not ends.above
    multiplied = []

    def noted(forward, x):
        multiplied.append(x[..., 0].numel())
        return forward(x)

    with ExitStack() as stack:
        for layer in ends.below:
            stack.enter_context(forward_of(layer, noted))
        coefficients_of(model, ends=ends)
    assert multiplied and max(multiplied) <= prompts()["input_ids"].numel()  # of 6 probes


@pytest.mark.parametrize("most", [1 << 22, 0])
def test_a_linear_head_multiplies_once_for_all_probes(monkeypatch, most):
    """Unless its weights at all of them were too many."""
    monkeypatch.setattr(split_heads, "MOST_NUMBERS", most)
    model, calls = pooled("attention"), []
    monkeypatch.setattr(Streamed, "of_probes", lambda self, *a: calls.append(len(a[1])) or real(self, *a))
    found = coefficients_of(model, probes_per_forward=30)[1]
    assert calls[-2:] == ([30, 30] if most else [])  # two layers, three queries, two signs, five rows
    monkeypatch.setattr(split_heads, "MOST_NUMBERS", 0)
    torch.testing.assert_close(found, coefficients_of(model, probes_per_forward=30)[1], atol=3e-4, rtol=1e-3)


def test_below_a_pooler_that_trains_blocks_are_shared(caplog):
    model = with_head("bert", layers_to_transform=[1])
    shared, plain = (coefficients_of(model, share_prefix=share)[1] for share in (True, False))
    torch.testing.assert_close(shared, plain, atol=3e-4, rtol=1e-3)
    assert plain.std() > 0.01 and not caplog.records


def test_a_budget_that_has_to_be_looked_up():
    """Below a pooler that trains: it is part of what is looked at."""
    model = with_head("bert")
    expected = coefficients_of(model)[1]
    torch.testing.assert_close(coefficients_of(model, memory_budget=300_000)[1], expected, atol=3e-4, rtol=1e-3)


def test_other_parameters_keep_a_forward_per_probe():
    model = with_head("bert")
    inner = model.get_base_model()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad and "tt_theta" not in name}
    assert heads_of(model, named) == [inner.bert.pooler, inner.classifier]
    assert heads_of(model, {**named, "word_embeddings": inner.bert.embeddings.word_embeddings.weight}) == []
    language_model = adapted("llama", modules_to_save=["lm_head"])
    assert heads_of(language_model, {"lm_head": language_model.get_base_model().lm_head.weight}) == []
    assert heads_of(torch.nn.Linear(2, 2), {}) == []
