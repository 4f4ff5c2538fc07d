"""From losses to coefficients: pure functions on small float64 tensors; no model, no device, no state.

Shapes: G groups of examples, Q queries (directions) per group, S probes per query. Every (group, query) pair has a
direction of its own; the estimate of the gradient is ``sum_j c_j z_j`` over all of them, with the coefficients below.
"""

import math
from dataclasses import dataclass

import torch

DIFFERENCES = ("central", "forward")
COMBINES = ("mean", "spread")


def probe_signs(difference: str) -> tuple[float, ...]:
    """Return the signs of a query's probes: ``(+1, -1)`` for central differences, ``(+1,)`` for forward ones."""
    if difference not in DIFFERENCES:
        raise ValueError(f"difference must be one of {DIFFERENCES}, got {difference!r}")
    return (1.0, -1.0) if difference == "central" else (1.0,)


def projected_gradients(losses: torch.Tensor, eps: float, difference: str) -> torch.Tensor:
    """Return the projected gradient of every query, ``[G, Q]`` float64; NaN where a loss it needs is not finite.

    Central: ``d = (l(theta + eps z) - l(theta - eps z)) / (2 eps)``.
    Forward, with the mean of the group's other queries as baseline:
    ``d_q = (l_q - mean_{p != q} l_p) / eps``; one row per query instead of two, unbiased to first order in eps.

    Args:
        losses: ``[G, Q, S]``, the group's mean loss at each probe, with S as in :func:`probe_signs`.
        eps: half the distance of the two probes (central), or their distance from theta (forward), > 0.
        difference: ``"central"`` or ``"forward"``.

    Raises:
        ValueError: a shape that does not fit, or forward differences with a single query per group (no baseline).

    Source: Spall 1992 (central, SPSA); Kool et al. 2019 (leave-one-out baseline).
    """
    signs = probe_signs(difference)
    if losses.ndim != 3 or losses.shape[2] != len(signs):
        raise ValueError(f"expected losses of shape [groups, queries, {len(signs)}], got {tuple(losses.shape)}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    losses = losses.double()
    if difference == "central":
        d = (losses[..., 0] - losses[..., 1]) / (2 * eps)
        return torch.where(torch.isfinite(d), d, torch.nan)
    if losses.shape[1] < 2:
        raise ValueError("forward differences take the mean of the other queries as baseline: use at least 2 queries")
    losses = losses[..., 0]
    finite = torch.isfinite(losses)
    total = torch.where(finite, losses, 0.0).sum(1, keepdim=True)
    others = finite.sum(1, keepdim=True) - 1
    baseline = (total - losses) / others
    return torch.where(finite & (others > 0), (losses - baseline) / eps, torch.nan)


def signal_to_noise(losses: torch.Tensor) -> float:
    """Return how far the losses of a pair of probes differ, over how far all pairs of a group differ in their mean.

    ``sqrt(mean_q odd_q^2 / var_q even_q)`` with ``odd = (l+ - l-) / 2`` and ``even = (l+ + l-) / 2``. The slope along a
    direction shows in the odd part alone; rounding shows in both alike, curvature in the even part alone. So a value
    near 1 says that the differences are rounding (raise eps) or that eps is too large for the curvature; a linear loss
    without rounding has no bound.

    Args:
        losses: ``[G, Q, 2]``, the group's mean (or summed) loss at each probe of central differences.

    Returns:
        The ratio over all groups; NaN for forward differences, or where no group has two finite queries.
    """
    if losses.shape[-1] != 2:
        return float("nan")
    odd, even = (losses[..., 0] - losses[..., 1]).double() / 2, losses.double().mean(-1)
    used = torch.isfinite(even)
    number = used.sum(1, keepdim=True)
    used = used & (number > 1)
    if not bool(used.any()):
        return float("nan")
    even = torch.where(used, even, 0.0)
    apart = torch.where(used, even - even.sum(1, keepdim=True) / number.clamp(min=1), 0.0)
    freedom = (number - 1).clamp(min=0)[used.any(1)].sum()
    signal = torch.where(used, odd, 0.0).square().sum() / used.sum()
    return float((signal / (apart.square().sum() / freedom)).sqrt())


@dataclass(frozen=True)
class Coefficients:
    """What the update multiplies each direction with, and what became of the queries.

    Args:
        values: float32-representable floats, one per query; 0 for a dropped query.
        dropped: number of queries whose losses were not finite.
        spread: root mean square of the projected gradients that were used (loss per unit of z).
        clipped: number of coefficients at the clipping bound.
    """

    values: list[float]
    dropped: int
    spread: float
    clipped: int


def coefficients(
    d: torch.Tensor, *, combine: str = "mean", floor: float = 0.0, clip: float | None = None
) -> Coefficients:
    """Return the coefficients ``c`` of the descent direction ``sum_j c_j z_j`` from projected gradients ``d``.

    ``"mean"``: ``c_j = d_j / N``. ``"spread"``: ``c_j = d_j / (N max(s, floor))`` with ``s = sqrt(mean(d^2))``: the
    step no longer depends on the scale of the loss, and the floor lets it shrink where the loss is flat.

    Args:
        d: projected gradients of all queries of the step, any shape, NaN for a query to drop. N counts the others.
        combine: ``"mean"`` or ``"spread"``.
        floor: smallest spread that is divided by, in loss per unit of z, >= 0.
        clip: bound on ``|d_j| / s``, or None; a single outlier cannot then carry the whole step.

    Raises:
        ValueError: unknown ``combine``, or a floor or clip out of its range or not finite.

    Source: FZOO (arXiv 2506.09034) and GRZO for the division by the spread of the projected gradients.
    """
    if combine not in COMBINES:
        raise ValueError(f"combine must be one of {COMBINES}, got {combine!r}")
    if not 0 <= floor < math.inf:
        raise ValueError(f"floor must not be negative, and finite, got {floor}")
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"clip must be positive and finite, or None, got {clip}")
    d = d.double().reshape(-1)
    used = torch.isfinite(d)
    number = int(used.sum())
    if number == 0:
        return Coefficients([0.0] * d.numel(), d.numel(), 0.0, 0)
    d = torch.where(used, d, 0.0)
    spread = float((d.square().sum() / number).sqrt())
    clipped = 0
    if clip is not None and spread > 0:
        clipped = int((d.abs() > clip * spread).sum())
        d = d.clamp(-clip * spread, clip * spread)
    divisor = number * (max(spread, floor) if combine == "spread" else 1.0)
    c = d / divisor if divisor > 0 else torch.zeros_like(d)
    return Coefficients(c.float().tolist(), int((~used).sum()), spread, clipped)
