"""Initial numbers of an adapter: a pure function of its layout, its place in ``theta`` and one seed.

Kept apart from the layer so that a journal can rebuild a run's first ``theta`` without the base model.
"""

import torch

from adazeta_kernels import TTAdapterLayout, TTShape, fill_normal_


def core_stds(shape: TTShape, gain: float) -> list[float]:
    """Return the standard deviation of every core's entries, so that ``x W`` has ``gain`` times the spread of ``x``.

    A core of shape ``(r, n, s)`` on the input side sums over ``r n`` products, one on the output side over ``r``, so
    ``1 / sqrt(r n)`` and ``1 / sqrt(r)`` keep the spread from core to core; ``gain`` goes into the first.
    """
    inputs = len(shape.in_factors)
    stds = [(r * n if k < inputs else r) ** -0.5 for k, (r, n, _) in enumerate(shape.core_shapes)]
    return [stds[0] * gain, *stds[1:]]


def initial_theta(
    layout: TTAdapterLayout, *, init: str, gain: float, seed: int, offset: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the initial numbers of one adapter, ``[layout.numel]`` float32.

    Args:
        layout: shapes and order of the adapter's cores and biases.
        init: ``"identity"`` leaves the last core of ``up`` and all biases zero, so that ``up(...) = 0``; ``"paper"``
            draws every core and leaves only the biases zero.
        gain: output spread of ``down`` for unit-variance input (``up`` always uses 1).
        seed: direction whose normals are scaled by :func:`core_stds`.
        offset: index of the adapter's first number in ``theta``; it selects the part of the direction, so the numbers
            depend on the adapter's place and not on the order of construction.
        out: written and returned, ``[layout.numel]`` float32; None makes it.
    """
    theta = torch.empty(layout.numel) if out is None else out
    fill_normal_(theta, seed, offset=offset)
    stds = core_stds(layout.down, gain) + core_stds(layout.up, 1.0)
    if init == "identity":
        stds[-1] = 0.0
    remaining = iter(stds)
    for segment in layout.segments():
        values = theta[segment.offset : segment.offset + segment.numel]
        # Zeroed, not multiplied by zero: no negative zeros in a checkpoint.
        std = 0.0 if segment.is_bias else next(remaining)
        values.mul_(std) if std else values.zero_()
    return theta
