"""The update of one step, written once: training applies it and a replay applies it again, to the same bits."""

from collections.abc import Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Step:
    """What the journal keeps of one step: enough, with the run seed, to do it again.

    Args:
        index: step number k from 0; with the run seed it names the directions.
        lr: learning rate.
        momentum: factor on the momentum buffer.
        weight_decay: decoupled weight decay per unit of learning rate.
        coefficients: float32 values, one per query, 0 for a dropped one.
    """

    index: int
    lr: float
    momentum: float
    weight_decay: float
    coefficients: Sequence[float]


@torch.no_grad()
def apply_step(trainable: Trainable, step: Step, run_seed: int, distribution: str) -> None:
    """Update the trainable numbers in place: ``theta <- (1 - lr wd) theta - lr g`` with ``g = sum_j c_j z_j``.

    With momentum ``m <- mu m + g`` takes the place of ``g``. Dropped queries (c = 0) cost nothing.

    Numerics: every operation is a single correctly rounded float32 operation per element or a ``perturb_``, so the
    result has the same bits on every machine. Biases are not decayed.
    """
    used = [(seed, c) for seed, c in zip(_seeds(step, run_seed), step.coefficients) if c != 0.0]
    seeds, values = [seed for seed, _ in used], [c for _, c in used]
    if step.weight_decay:
        for view in trainable.decayed:
            view.mul_(1.0 - step.lr * step.weight_decay)
    if not step.momentum:
        if used:
            perturb_(trainable.tensors, seeds, [_float32(-step.lr * c) for c in values], distribution=distribution)
        return
    if not trainable.momentum:
        trainable.momentum = [torch.zeros_like(t, dtype=torch.float32) for t in trainable.tensors]
    if used:
        perturb_(trainable.momentum, seeds, values, decay=_float32(step.momentum), distribution=distribution)
    else:
        for m in trainable.momentum:
            m.mul_(_float32(step.momentum))
    for tensor, m in zip(trainable.tensors, trainable.momentum):
        # Two operations on purpose: an alpha= would be a fused multiply-add on some builds and not on others.
        tensor.add_(m.mul(-step.lr).to(tensor.dtype))


def _seeds(step: Step, run_seed: int) -> list[int]:
    return derive_seeds(run_seed, step.index, len(step.coefficients))


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()
