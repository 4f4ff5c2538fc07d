"""The step that the estimates since the last one ask for."""

from dataclasses import replace

import torch

from .config import check_update
from .digests import crc_of
from .errors import Diverged
from .estimator import coefficients
from .update import Step, Trainable


def next_step(optimizer, trainable: Trainable) -> Step:
    """Return the step that the estimates ask for, or the one that goes back because the guard refuses it."""
    if not optimizer._projected:
        raise RuntimeError("step() without estimate(): there is nothing to update with")
    result = coefficients(
        torch.cat(optimizer._projected), combine=optimizer.combine, floor=optimizer.floor, clip=optimizer.clip
    )
    group = optimizer.param_groups[0]
    check_update(*(group[name] for name in ("lr", "momentum", "weight_decay")))  # a schedule may have set them
    finite = [loss for loss in optimizer._mean_losses if loss == loss]
    # A digest of every step where theta is small; of so few that they cost little where it is not.
    digest_due = optimizer.journal is not None and optimizer.step_index % (1 + (trainable.numel >> 16)) == 0
    step = Step(
        index=optimizer.step_index,
        lr=float(group["lr"]) * optimizer.guard.lr_factor,
        momentum=group["momentum"],
        weight_decay=group["weight_decay"],
        coefficients=tuple(result.values),
        loss=sum(finite) / len(finite) if finite else float("nan"),
        spread=torch.tensor(result.spread, dtype=torch.float32).item(),
        rows=optimizer.rows - optimizer._counted[0],
        losses=optimizer.evaluations - optimizer._counted[1],
        dropped=result.dropped,
        clipped=result.clipped,
        digest=crc_of(trainable.tensors) if digest_due else None,
    )
    reason = optimizer.guard.objection(step)
    if not reason:
        return step
    reason = f"step {step.index} is refused: {reason}"
    if optimizer.guard.policy != "rollback" or optimizer.guard.went_back >= optimizer.guard.rollbacks:
        raise Diverged(f"{reason}; try a smaller lr, or on_divergence='rollback'")
    if optimizer.journal is None:
        raise Diverged(f"{reason}, and without a journal there is nothing to go back to")
    return replace(step, coefficients=(), back_to=optimizer.guard.best_step)
