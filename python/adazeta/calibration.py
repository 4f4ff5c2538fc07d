"""Where a probe should be, and how far a step should go: measured on a few batches instead of guessed.

Notation: along a direction ``z`` the loss of a group of rows (the rows that share a direction in training) is
``l(eps) = l(theta + eps z) + noise``, the noise being what rounding in the forward does to it, with standard deviation
``sigma``. ``g = z'grad`` is the projected gradient, ``h = z'Hz`` the curvature and ``t`` the third derivative along z.

The functions on arrays are pure; :func:`measure` evaluates all probes through ``ZerothOrder``, in batched forwards,
and leaves the model as it was.

Sources: Gill, Murray, Saunders and Wright 1983 (SIAM J. Sci. Stat. Comput. 4) and Moré and Wild 2011, 2012 (SIAM J.
Sci. Comput. 33; ACM TOMS 38) for noise from differences and the best interval; Spall 1992 for the variance of
simultaneous perturbations; Malladi et al. 2023 (MeZO, arXiv 2305.17333) for the descent lemma with the trace of the
Hessian; Polyak 1963 for the decrease of a loss whose gradient shrinks with it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from adazeta_kernels import derive_seeds

from .errors import UserError
from .estimates import losses_of
from .optimizer import ZerothOrder
from .probes import Plan, batch_size, groups_of

LARGEST, LEVELS = 0.25, 12  # the ladder of distances: 1/4, 1/8, ..., 2^-13
_STEP = 2**48  # no run has as many steps: the directions of a calibration are none of its training's


@dataclass(frozen=True)
class Calibration:
    """What was measured, and what follows from it.

    Args:
        eps, lr: the proposals.
        loss: mean loss at theta.
        noise: ``sigma``, standard deviation of the rounding noise in the loss of a group of rows.
        spread: root mean square of a group's projected gradients.
        curvature: mean of ``z'Hz`` over directions: the trace of the Hessian.
        third: root mean square of the third derivative along a direction.
        gradient: norm of the gradient of the mean loss, and ``resolved``, whether it stands out of its error.
        snr: of one projected gradient at ``eps``, root mean square signal over root mean square error.
        cosine: between the estimate of one step and the gradient, expected at the middle of the run.
        predicted: loss expected at the end of the run.
        numbers: trained numbers. ``directions``: directions of a step, mean over the run. ``steps``: of the run.
        losses: evaluated to find this out.
        ladder: distances ``eps``; at each the rms ``projected`` gradient of a group, its ``error`` (from contrasts of
            neighbouring distances, as of :func:`fit_noise`), and the mean ``rise`` of the loss; None where not finite.
        rates: learning rates, and the loss expected with each.
    """

    eps: float
    lr: float
    loss: float
    noise: float
    spread: float
    curvature: float
    third: float
    gradient: float
    resolved: bool
    snr: float
    cosine: float
    predicted: float
    numbers: int
    directions: float
    steps: int
    losses: int
    ladder: dict[str, list] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return asdict(self)

    def warnings(self) -> list[str]:
        """Return what makes the proposals doubtful, one line each."""
        found = []
        if not self.resolved:
            found.append(
                "the gradient is not told apart from its error: the learning rate is a guess, more --batches make it "
                "better"
            )
        if self.snr < 3:
            found.append(
                f"rounding takes much of a projected gradient, signal to noise {self.snr:.1f}: --dtype float32 has less"
            )
        if self.predicted >= self.loss:
            found.append("no learning rate lets the loss fall in so many steps: take more --queries or --steps")
        return found


@dataclass(frozen=True)
class Run:
    """What a learning rate depends on besides the loss.

    Args:
        factors: the schedule, the learning rate of each step over the highest.
        directions: independent directions of each step, as many as factors.
        momentum: factor on the running direction.
        combine: ``"mean"`` or ``"spread"``.
        floor: smallest spread that is divided by.
    """

    factors: Sequence[float]
    directions: Sequence[float]
    momentum: float = 0.0
    combine: str = "spread"
    floor: float = 0.0


def fit_noise(eps: np.ndarray, odd: np.ndarray) -> tuple[float, float]:
    """Return the noise ``sigma`` of a loss, and ``t``, the rms third derivative, from losses at halving distances.

    The odd part ``o(eps) = (l(eps) - l(-eps)) / 2 = g eps + t eps^3/6 + noise`` has noise of variance ``sigma^2/2``;
    the contrast ``c = o(eps) - 2 o(eps/2) = t eps^3/8 + noise`` is rid of the gradient, so that
    ``mean(c^2) / 2.5 = sigma^2 + t^2 eps^6 / 160``: level at small distances, steep at large ones.

    Args:
        eps: ``[E]``, each half of the one before.
        odd: ``[E, ...]``, NaN where a loss was not finite.

    Returns:
        ``(sigma, t)``, fitted by least absolute deviations of the logarithms, so that levels where the loss is no
        cubic any more, or a perturbation is rounded away, count little.

    Source: as a difference table kills what is smooth (Moré and Wild 2011), here with the ladder that is measured
    anyway.
    """
    contrast = (odd[:-1] - 2 * odd[1:]).reshape(len(eps) - 1, -1)
    values = (
        np.array([np.mean(row[np.isfinite(row)] ** 2) if np.isfinite(row).any() else 0.0 for row in contrast]) / 2.5
    )
    # Where most differences are exactly 0 the perturbation is rounded away, and noise with it.
    alive = values > 0
    alive &= np.array([np.mean(row == 0) < 0.5 for row in contrast])
    if not alive.any():
        return 0.0, 0.0
    values = np.array([np.mean(row[np.isfinite(row)] ** 2) for row in contrast[alive]]) / 2.5
    sixth = eps[:-1][alive] ** 6 / 160
    low, high = math.log(values.min()) - 3, math.log(values.max()) + 3
    noise = np.linspace(low, high, 161)
    third = np.linspace(low - math.log(sixth.max()) - 3, high - math.log(sixth.min()) + 3, 641)
    model = np.logaddexp(noise[:, None, None], third[None, :, None] + np.log(sixth))
    misfit = np.abs(model - np.log(values)).sum(-1)
    best = np.unravel_index(misfit.argmin(), misfit.shape)
    return math.exp(noise[best[0]] / 2), math.exp(third[best[1]] / 2)


def best_eps(noise: float, third: float, limits: tuple[float, float]) -> float:
    """Return the distance with the smallest error of a projected gradient, within limits.

    The error's mean square is ``(t eps^2/6)^2 + sigma^2 / (2 eps^2)``, smallest at ``eps = (3 sigma / t)^(1/3)``.

    Source: Gill et al. 1983 for central differences.
    """
    if noise == 0 or third == 0:
        return limits[noise > 0]
    return min(max((3 * noise / third) ** (1 / 3), limits[0]), limits[1])


def projection_error(eps, noise: float, third: float):
    """Return the root mean square error of a projected gradient at distance ``eps``: bias and noise."""
    return np.sqrt((third * eps**2 / 6) ** 2 + noise**2 / (2 * eps**2))


def gradient_norm(projected: np.ndarray) -> tuple[float, float]:
    """Return the square of the norm of the mean loss's gradient, and its standard error, from rows of a sample.

    ``E[d_i d_k] = grad_i'grad_k`` for the projected gradients ``d`` of two rows along the same random direction, so the
    mean over pairs of different rows is unbiased: neither the rows' own gradients nor rounding noise count.

    Args:
        projected: ``[Q, B]``, directions by rows.
    """
    rows = projected.shape[1]
    pairs = (projected.sum(1) ** 2 - (projected**2).sum(1)) / (rows * (rows - 1))
    # Both directions and rows are samples: the error of each, from halves of the rows for the latter.
    halves = projected[:, ::2].mean(1) * projected[:, 1::2].mean(1)
    return float(pairs.mean()), float(max(pairs.std(), halves.std()) / math.sqrt(len(pairs)))


def predict_loss(lr, run: Run, *, loss: float, gradient2: float, spread: float, rise: Callable[[Any], Any]):
    """Return the loss expected after a run with learning rate ``lr`` (an array): progress, and the price of noise.

    A step moves theta by ``a u`` with ``a = lr / (1 - momentum)`` and ``u = c sum_j d_j z_j / N``, ``c`` the
    normalising factor of ``combine`` (1, or one over the spread ``s``): ``E u = c grad``, and every number of u has
    variance ``c^2 s^2 / N``. Progress of a loss whose squared gradient shrinks as it does is exponential; noise adds up
    over the steps to a random displacement of ``r`` per number, whose price is measured along random directions:

        ``L = loss exp(-c |grad|^2 sum_k a_k / loss) + rise(r)``, ``r^2 = c^2 s^2 sum_k a_k^2 / N_k``

    Args:
        lr: learning rates, the highest of the schedule.
        run: its schedule.
        loss: at the start.
        gradient2: squared norm of the gradient.
        spread: of the projected gradients.
        rise: mean rise of the loss at a random displacement, per unit of ``z``.

    Source: the descent lemma for simultaneous perturbations (Malladi et al. 2023, lemma 2), ``rise(r) = r^2 tr(H) / 2``
    to second order, and the exponential decrease of Polyak 1963.
    """
    factors, directions = np.asarray(run.factors, float), np.asarray(run.directions, float)
    scale = (
        (1 / max(spread, run.floor, 1e-30) if run.combine == "spread" else 1.0) * np.asarray(lr) / (1 - run.momentum)
    )
    displacement = scale * spread * math.sqrt((factors**2 / directions).sum())
    return loss * np.exp(-scale * gradient2 * factors.sum() / max(loss, 1e-30)) + rise(displacement)


def _factor(run: Run, spread: float) -> float:
    """Return what the mean of ``d_j z_j`` is multiplied with, per unit of learning rate."""
    return (1 / max(spread, run.floor, 1e-30) if run.combine == "spread" else 1.0) / (1 - run.momentum)


def rise_of(eps: np.ndarray, even: np.ndarray) -> Callable[[Any], Any]:
    """Return the mean rise of the loss at a random displacement: a function, from ``(l(eps) + l(-eps))/2 - l``.

    Between the distances ``rise / eps^2`` is interpolated in the logarithm of the distance; beyond them it is constant.

    Args:
        eps: ``[E]`` falling.
        even: ``[E]`` means, already rid of levels that noise dominates.
    """
    ratio = np.maximum(even, 0.0) / eps**2

    def rise(displacement):
        displacement = np.asarray(displacement, float)
        return displacement**2 * np.interp(np.log(np.maximum(displacement, 1e-30)), np.log(eps[::-1]), ratio[::-1])

    return rise


def best_lr(run: Run, *, largest: float, **measured) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the learning rate with the smallest :func:`predict_loss`, the rates that were tried, and their losses.

    Args:
        run: the schedule.
        largest: random displacement per number that no rate may go beyond: where the loss has been measured.
        **measured: the further arguments of :func:`predict_loss`.
    """
    rates = 10.0 ** np.arange(-7, 1.0001, 0.025)
    noise = math.sqrt((np.asarray(run.factors, float) ** 2 / np.asarray(run.directions, float)).sum())
    rates = rates[rates * _factor(run, measured["spread"]) * measured["spread"] * noise <= largest]
    if not len(rates):
        raise UserError("calibration: every learning rate from 1e-7 on ends beyond what was measured: train less steps")
    losses = predict_loss(rates, run, **measured)
    return float(rates[losses.argmin()]), rates, losses


def rounded(value: float) -> float:
    """Return a number to two significant digits: what is proposed can be said, and typed again."""
    return float(f"{value:.1e}")


@torch.no_grad()
def measure(
    optimizer: ZerothOrder,
    loss_fn: Callable,
    batches: Sequence[Mapping[str, Any]],
    run: Run,
    *,
    eps: float | None = None,
    lr: float | None = None,
    directions: int = 32,
    progress: Callable[[int], None] = lambda rows: None,
) -> Calibration:
    """Measure noise, curvature and gradient at the optimizer's theta, and propose ``eps`` and ``lr`` for a run.

    The first batch is looked at along a quarter of the directions at every distance of the ladder, all batches along
    all directions at the ``eps`` that follows. Neither theta nor the optimizer changes, and the same call gives the
    same numbers wherever losses have the same bits.

    Args:
        optimizer: made as for training; its eps and lr do not matter.
        loss_fn: as for ``ZerothOrder.estimate``.
        batches: each of as many examples as a batch in training.
        run: the run that they are for.
        eps, lr: taken as they are where they are given.
        directions: how many, at least 8.
        progress: told how many losses have been evaluated since the last call.

    Raises:
        ValueError: no batch, or fewer than 8 directions.
        UserError: the loss is not finite, or rounding hides the gradient at every distance.
    """
    if not batches or directions < 8:
        raise ValueError(f"expected at least one batch and 8 directions, got {len(batches)} and {directions}")
    group = batch_size(batches[0]) // groups_of(optimizer.directions, batch_size(batches[0]))
    ladder, count = LARGEST * 0.5 ** np.arange(LEVELS), 0

    def losses(batch, scales: Sequence[float], wanted: int, at_once: int) -> np.ndarray:
        nonlocal count
        parts = []
        for first in range(0, wanted, at_once):
            seeds = derive_seeds(optimizer.run_seed, _STEP, min(first + at_once, wanted))[first:]
            plan = Plan(seeds, scales[0], tuple(scale / scales[0] for scale in scales), 1, batch_size(batch))
            parts.append(losses_of(optimizer, plan, batch, loss_fn)[0][0].double().numpy())
            count += plan.rows
            progress(plan.rows)
        return np.concatenate(parts)  # [Q, S, B]

    def by_group(values: np.ndarray) -> np.ndarray:
        return values.reshape(*values.shape[:-1], -1, group).mean(-1)

    signs = [sign * distance for distance in ladder for sign in (1.0, -1.0)]
    found = losses(batches[0], [*signs, 0.0], directions // 4, 1)
    if not np.isfinite(found[:, -1]).all():
        raise UserError("calibration: the loss is not finite before the first step; use --dtype float32")
    plus, minus = found[:, 0:-1:2], found[:, 1:-1:2]
    odd, even = np.swapaxes(by_group(plus - minus) / 2, 0, 1), (plus + minus).mean((0, 2)) / 2 - found[:, -1].mean()
    noise, third = fit_noise(ladder, odd)
    chosen = rounded(best_eps(noise, third, (ladder[-1], ladder[0]))) if eps is None else eps
    pairs = np.concatenate([losses(batch, [chosen, -chosen], directions, 8) for batch in batches], -1)
    projected = (pairs[:, 0] - pairs[:, 1]) / (2 * chosen)
    projected = projected[:, np.isfinite(projected).all(0)]  # rows that have a loss everywhere
    if projected.shape[1] < (fewest := max(2, group)):
        raise UserError(f"calibration: fewer than {fewest} rows have finite losses at eps {chosen:g}: try float32")
    projected = projected[:, : projected.shape[1] // group * group]
    spread = float(np.sqrt(np.mean(by_group(projected) ** 2)))
    error = float(projection_error(chosen, noise, third))
    if not spread > 2 * error:
        raise UserError(
            f"calibration: rounding hides the gradient: projected gradients of {spread:.2g} have errors of {error:.2g} "
            f"at eps {chosen:g}; use --dtype float32, or adapters that the loss depends on"
        )
    gradient2, deviation = gradient_norm(projected)
    resolved, gradient2 = gradient2 > 2 * deviation, max(gradient2, deviation)
    used = np.isfinite(even) & (ladder >= min(chosen, ladder[0]) / 1.5)  # nearer, noise is what is seen
    rise = rise_of(ladder[used], even[used])
    measured = {"loss": float(np.nanmean(pairs)), "gradient2": gradient2, "spread": spread, "rise": rise}
    best, rates, expected = best_lr(run, largest=float(ladder[used][0]), **measured)
    chosen_lr = rounded(best) if lr is None else lr
    numbers, mean_directions = optimizer.trainable().numel, float(np.mean(run.directions))
    nearest = int(np.abs(np.log(ladder[used] / chosen)).argmin())
    # A contrast is an error of its own size: scaled as the fitted contrast is to the fitted error.
    contrasts = np.sqrt(np.nanmean((odd[:-1] - 2 * odd[1:]) ** 2, (1, 2)))
    fitted = np.sqrt(2.5 * noise**2 + (third * ladder[:-1] ** 3 / 8) ** 2)
    errors = contrasts * projection_error(ladder[:-1], noise, third) / np.maximum(fitted, 1e-300)
    return Calibration(
        eps=float(chosen),
        lr=float(chosen_lr),
        loss=measured["loss"],
        noise=noise,
        spread=spread,
        curvature=float(2 * even[used][nearest] / ladder[used][nearest] ** 2),
        third=third,
        gradient=math.sqrt(gradient2),
        resolved=bool(resolved),
        snr=spread / max(error, 1e-12 * spread),
        cosine=1 / math.sqrt(1 + spread**2 / gradient2 * numbers / mean_directions),
        predicted=float(predict_loss(chosen_lr, run, **measured)),
        numbers=numbers,
        directions=mean_directions,
        steps=len(run.factors),
        losses=count,
        ladder={
            "eps": ladder.tolist(),
            "projected": _finite(np.sqrt(np.nanmean(odd**2, (1, 2))) / ladder),
            "error": _finite(errors),
            "rise": _finite(even),
        },
        rates={"lr": rates.tolist(), "loss": expected.tolist()},
    )


def _finite(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
