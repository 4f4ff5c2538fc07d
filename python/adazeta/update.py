"""The update of one step, written once: training applies it and a replay applies it again, to the same bits."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from adazeta_kernels import derive_seeds, perturb_


@dataclass
class Trainable:
    """The trainable numbers of a run.

    Args:
        tensors: flat ``theta`` first (if there are adapters), then further parameters; element i of a direction
            belongs to element i of their concatenation.
        decayed: views into ``tensors`` that weight decay shrinks (everything but biases).
        momentum: one float32 buffer per tensor, empty until a step uses momentum.
    """

    tensors: list[torch.Tensor]
    decayed: list[torch.Tensor]
    momentum: list[torch.Tensor] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors)


@dataclass(frozen=True, eq=False)
class Step:
    """What the journal keeps of one step: enough, with the run seed, to do it again, and what it cost.

    Args:
        index: step number k from 0; with the run seed it names the directions.
        lr: learning rate.
        momentum: factor on the momentum buffer.
        weight_decay: decoupled weight decay per unit of learning rate.
        coefficients: float32 values, one per query, 0 for a dropped one.
        loss: mean of the step's finite losses, NaN where there was none.
        spread: root mean square of the projected gradients, in float32.
        rows: forward rows of this step.
        losses: losses evaluated in this step.
        dropped: queries without finite losses.
        clipped: coefficients at the clipping bound.
        digest: CRC-32 of the trainable numbers before the step, or None.
        back_to: the step refused its result: the trainable numbers become those before step ``back_to``.
    """

    index: int
    lr: float
    momentum: float
    weight_decay: float
    coefficients: Sequence[float]
    loss: float = float("nan")
    spread: float = 0.0
    rows: int = 0
    losses: int = 0
    dropped: int = 0
    clipped: int = 0
    digest: int | None = None
    back_to: int | None = None


def step_scales(step: Step) -> torch.Tensor:
    """Return the factor on every direction, ``-lr c`` in float32, or ``c`` where a momentum buffer takes them."""
    values = np.asarray(step.coefficients, np.float32)
    if step.momentum:
        return torch.from_numpy(values.copy())
    with np.errstate(over="ignore"):  # an infinite scale is refused by those who use it
        return torch.from_numpy((values.astype(np.float64) * -step.lr).astype(np.float32))


@torch.no_grad()
def apply_step(
    trainable: Trainable, step: Step, run_seed: int, distribution: str, *, seeds=None, backend: str | None = None
) -> None:
    """Update the trainable numbers in place: ``theta <- (1 - lr wd) theta - lr g`` with ``g = sum_j c_j z_j``.

    With momentum ``m <- mu m + g`` takes the place of ``g``. Dropped queries (c = 0) cost nothing.

    Args:
        trainable: what is updated.
        step: the step, which must not be one that goes back.
        run_seed, distribution: with the step they name the directions.
        seeds: uint64 array of the step's seeds, where they have been derived already.
        backend: as of ``perturb_``.

    Numerics: every operation is a single correctly rounded float32 operation per element or a ``perturb_``, so the
    result has the same bits on every machine. Biases are not decayed.
    """
    if seeds is None:
        seeds = np.array(derive_seeds(run_seed, step.index, len(step.coefficients)), np.uint64)
    used = np.flatnonzero(np.asarray(step.coefficients, np.float32))
    seeds = torch.from_numpy(seeds[used].view(np.int64))
    scales = step_scales(step)[torch.from_numpy(used)]
    options = {"distribution": distribution, "backend": backend}
    if step.weight_decay and trainable.decayed:
        torch._foreach_mul_(trainable.decayed, 1.0 - step.lr * step.weight_decay)
    if not step.momentum:
        if len(used):
            perturb_(trainable.tensors, seeds, scales, **options)
        return
    if not trainable.momentum:
        trainable.momentum = [torch.zeros_like(t, dtype=torch.float32) for t in trainable.tensors]
    if len(used):
        perturb_(trainable.momentum, seeds, scales, decay=_float32(step.momentum), **options)
    else:
        for m in trainable.momentum:
            m.mul_(_float32(step.momentum))
    for tensor, m in zip(trainable.tensors, trainable.momentum):
        # Two operations on purpose: an alpha= would be a fused multiply-add on some builds and not on others.
        tensor.add_(m.mul(-step.lr).to(tensor.dtype))


def _float32(value: float) -> float:
    return float(np.float32(value))
