"""Models that torch.compile has been called on: the same losses, without the ways that stand in for their forwards."""

import logging

import pytest
import torch
from peft import get_peft_model
from tiny import lm_batch, tiny_llama

from adazeta import TTConfig, ZerothOrder
from adazeta.losses import lm_loss


@pytest.fixture(autouse=True)
def uncompiled_calls():
    """Nothing here depends on what a compiler makes of a model, which takes it seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def first_loss(model, **settings):
    return ZerothOrder(model, queries=2, eps=1e-2, **settings).estimate(lm_loss, lm_batch())


def adapted():
    return get_peft_model(tiny_llama(2), TTConfig(rank=2, bottleneck=4, layers_to_transform=[1])).eval()


def test_adapters_in_a_compiled_model():
    assert first_loss(torch.compile(adapted())) == first_loss(adapted())


def test_adapters_in_a_compiled_decoder(caplog):
    model = adapted()
    model.base_model.model.model = torch.compile(model.base_model.model.model)
    assert ZerothOrder(adapted()).ends.describe() and not ZerothOrder(model).ends.describe()
    with caplog.at_level(logging.WARNING, "adazeta"):
        assert first_loss(model) == pytest.approx(first_loss(adapted()), rel=1e-6)
    assert "blocks below the first adapter run once per probe: the model is compiled" in caplog.text


def test_own_parameters_of_a_compiled_model_in_place():
    expected = first_loss(tiny_llama(1), perturb="in-place")
    assert first_loss(torch.compile(tiny_llama(1)), perturb="in-place") == pytest.approx(expected, rel=1e-6)
