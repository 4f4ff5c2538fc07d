"""Factors evaluated for groups of layers: the bits of one call per layer, in as few calls as the limit allows."""

from types import SimpleNamespace

import pytest
import torch

from adazeta import factors
from adazeta.factors import FactorGroups
from adazeta.probes import Probes
from adazeta_kernels import TTAdapterLayout, tt_factors

A, B = TTAdapterLayout.auto(24, 8, 2), TTAdapterLayout.auto(36, 8, 3)
PROBES = Probes.of([3, 2**64 - 1], [0.5, -0.1], distribution="rademacher")


def layers_of(layouts):
    """Layers whose adapters lie one behind the other, and theta."""
    layers, offset = [], 0
    for layout in layouts:
        layers.append(SimpleNamespace(offset={"default": offset}, layout={"default": layout}))
        offset += layout.numel
    return layers, torch.randn(offset)


def alone(layer, theta):
    offset, layout = layer.offset["default"], layer.layout["default"]
    own = theta[offset : offset + layout.numel]
    return tt_factors(own, layout, PROBES.seeds, PROBES.scales, offset=offset, distribution="rademacher")


@pytest.fixture
def calls(monkeypatch):
    """How many adapters each call of tt_factors evaluated."""
    counts = []

    def counting(*args, adapters, **kwargs):
        counts.append(adapters)
        return tt_factors(*args, adapters=adapters, **kwargs)

    monkeypatch.setattr(factors, "tt_factors", counting)
    return counts


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1 << 30, [3, 2, 1]),
        (2 * len(PROBES) * 4 * A.factor_numel, [2, 1, 1, 1, 1]),  # two of A, one of B
        (0, [1] * 6),
    ],
    ids=["all", "two", "one"],
)
def test_groups_are_runs_of_one_layout_within_the_limit(monkeypatch, calls, limit, expected):
    assert B.factor_numel > A.factor_numel
    monkeypatch.setitem(factors.FACTOR_BYTES, "cpu", limit)
    layers, theta = layers_of([A, A, A, B, B, A])
    groups = FactorGroups(layers, PROBES, theta)
    for layer in layers:
        assert torch.equal(groups.of(layer), alone(layer, theta))
    assert calls == expected


def test_any_order_and_again(calls):
    layers, theta = layers_of([A, A, B, A])
    groups = FactorGroups(layers, PROBES, theta)
    for position in (3, 0, 0, 1, 2, 1):
        assert torch.equal(groups.of(layers[position]), alone(layers[position], theta))
    assert calls == [1, 2, 1, 2]  # the factors of the last group are kept, no others


def test_no_more_than_the_limit_is_kept(monkeypatch):
    monkeypatch.setitem(factors.FACTOR_BYTES, "cpu", 3 * len(PROBES) * 4 * A.factor_numel)
    layers, theta = layers_of([A] * 8)
    groups = FactorGroups(layers, PROBES, theta)
    for layer in layers:
        assert groups.of(layer).untyped_storage().nbytes() <= factors.FACTOR_BYTES["cpu"]
