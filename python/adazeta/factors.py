"""Factors of neighbouring adapters, made by one call and handed to the layers one after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from adazeta_kernels import tt_factors

if TYPE_CHECKING:
    from .probes import Probes
    from .tuner.layer import TTLayer

#: Most bytes of factors that are kept at a time. On a GPU one launch then serves dozens of adapters, for a few per cent
#: of what the activations of a forward take; on a CPU factors should still be in the cache when they are used.
FACTOR_BYTES = {"cpu": 1 << 20, "meta": 1 << 20, "default": 1 << 27}


class FactorGroups:
    """The factors of all layers at some probes, evaluated for a group of layers when its first one asks.

    A group is a run of layers whose adapters have one layout and lie one behind the other in theta, of at most
    ``FACTOR_BYTES`` (always one). Only the factors of the last group are kept. Layers may ask in any order and any
    number of times; theta must not change meanwhile. The bits are those of one call per layer.

    Args:
        layers: in the order of their adapters in ``theta``.
        probes: at which points.
        theta: the flat theta that all layers' parameters are views of.
    """

    def __init__(self, layers: list[TTLayer], probes: Probes, theta: torch.Tensor):
        self._probes, self._theta = probes, theta
        self._place: dict[int, tuple[int, int]] = {}  # of a layer: first number of its group in theta, position in it
        self._size: dict[int, int] = {}  # of the group that begins there
        self._begin: int | None = None
        self._factors: torch.Tensor | None = None
        limit, name = FACTOR_BYTES.get(theta.device.type, FACTOR_BYTES["default"]), probes.adapter
        before, begin, most = None, 0, 0
        for layer in layers:
            offset, layout = layer.offset[name], layer.layout[name]
            same = layout is before or layout == before
            if not same or self._size[begin] >= most:
                begin, most = offset, limit // (4 * len(probes) * layout.factor_numel)
                self._size[begin] = 0
            self._place[id(layer)] = (begin, self._size[begin])
            self._size[begin] += 1
            before = layout

    def of(self, layer: TTLayer) -> torch.Tensor:
        """Return the factors ``[P, F]`` of a layer."""
        begin, position = self._place[id(layer)]
        if begin != self._begin:
            self._begin = self._factors = None  # freed before the next ones are allocated
            layout, count, probes = layer.layout[self._probes.adapter], self._size[begin], self._probes
            self._factors = tt_factors(
                self._theta[begin : begin + count * layout.numel],
                layout,
                probes.seeds,
                probes.scales,
                offset=begin,
                adapters=count,
                distribution=probes.distribution,
            )
            self._begin = begin
        return self._factors[position]
