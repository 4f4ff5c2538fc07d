"""Initial numbers of an adapter: a pure function of its layout, its place in ``theta`` and one seed.

Kept apart from the layer so that a journal can rebuild a run's first ``theta`` without the base model.
"""

import math

import torch

from adazeta_kernels import TTAdapterLayout, TTShape, fill_normal_


def core_std(shape: TTShape, gain: float) -> float:
    """Return the standard deviation of every core entry for which ``x W`` keeps ``gain`` times the spread of ``x``.

    An entry of ``W`` sums ``prod(ranks)`` products of one entry per core, so with independent entries
    ``var(W) = sigma^(2 m) prod(ranks)``; ``d_in var(W) = gain^2`` gives ``sigma``.
    """
    variance = gain**2 / (shape.d_in * math.prod(shape.ranks))
    return variance ** (0.5 / len(shape.core_shapes))


def initial_theta(layout: TTAdapterLayout, *, init: str, gain: float, seed: int, offset: int) -> torch.Tensor:
    """Return the initial numbers of one adapter, ``[layout.numel]`` float32.

    Args:
        layout: shapes and order of the adapter's cores and biases.
        init: ``"identity"`` leaves the last core of ``up`` and all biases zero, so that ``up(...) = 0``; ``"paper"``
            draws every core and leaves only the biases zero.
        gain: output spread of ``down`` for unit-variance input (``up`` always uses 1).
        seed: direction whose normals are scaled by :func:`core_std`.
        offset: index of the adapter's first number in ``theta``; it selects the part of the direction, so the numbers
            depend on the adapter's place and not on the order of construction.
    """
    theta = torch.empty(layout.numel)
    fill_normal_(theta, seed, offset=offset)
    cores = [segment for segment in layout.segments() if not segment.is_bias]
    for segment in layout.segments():
        values = theta[segment.offset : segment.offset + segment.numel]
        if segment.is_bias or (init == "identity" and segment == cores[-1]):
            values.zero_()
        elif segment.name.startswith("down"):
            values.mul_(core_std(layout.down, gain))
        else:
            values.mul_(core_std(layout.up, 1.0))
    return theta
