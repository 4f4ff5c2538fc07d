"""Looked at once, at an optimizer's first estimate: whether what saves work changes the losses of this model."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from .frozen import PackedLinear
from .in_place import InPlace
from .planner import Planner
from .probes import Plan, batch_size, evaluate_probes, take_rows
from .streamed import Streamed
from .tokens import looking

#: Rows of the batch that are looked at; one alone would fail in batch norm.
ROWS = 2
#: Scale of the probe that shares the forward: so far away that whatever passes from row to row shows.
FAR = 1.0


def tolerance(model: nn.Module) -> float:
    """Return the relative difference up to which losses are equal: the root of the coarsest dtype's epsilon."""
    held = [*model.parameters(), *(m.packed for m in model.modules() if isinstance(m, PackedLinear))]
    dtypes = {tensor.dtype for tensor in held if tensor.is_floating_point()}
    for device in {tensor.device.type for tensor in held} - {"meta"}:  # where `device_map` offloads them
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
    return max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5


def rows_mix(model: nn.Module, batch: Mapping[str, Any], loss_fn: Callable, *, eps: float, **settings) -> bool | None:
    """Tell whether a row's loss depends on the other rows of its forward, and warn if so; None if it is not finite.

    The losses of ``ROWS`` examples at a probe are compared with theirs beside a probe far away, and beside another
    example.

    Args:
        batch: the examples.
        loss_fn: maps an expanded batch to one loss per row.
        eps: distance of the probe that is looked at.
        settings: as for ``evaluate_probes``.
    """
    rows = min(ROWS, batch_size(batch))

    def at(*signs: float, examples=range(rows)) -> torch.Tensor:
        plan = Plan([0], eps, signs, 1, rows)
        part = take_rows(batch, torch.tensor(examples))
        return evaluate_probes(plan, part, loss_fn, planner=Planner(probes_per_forward=len(signs)), **settings)[0, 0, 0]

    alone = at(1.0)
    if not bool(torch.isfinite(alone).all()):
        return None
    beside, first = at(1.0, FAR / eps), at(1.0, examples=[0] * rows)[:1]
    if _equal(beside, alone, model) and _equal(first, alone[:1], model):
        return False
    again = at(1.0)
    if not _equal(again, alone, model):
        warnings.warn(
            f"the loss of a row is random: {alone[0]:.6g}, then {again[0]:.6g} at the same point; model.eval() turns "
            "dropout off, whose noise hides the differences that are measured",
            RuntimeWarning,
            stacklevel=6,
        )
        return False
    other = first if _equal(beside, alone, model) else beside
    warnings.warn(
        f"the loss of a row depends on the other rows of its forward: {alone[0]:.6g}, and {other[0]:.6g} beside others "
        "(batch norm in train mode, routing by batch statistics, or a loss divided by all tokens?); from now on every "
        "probe has a forward of its own",
        RuntimeWarning,
        stacklevel=6,
    )
    return True


def _equal(losses: torch.Tensor, expected: torch.Tensor, model: nn.Module) -> bool:
    return bool(((losses - expected).abs() <= tolerance(model) * (1 + expected.abs())).all())


class FirstLook:
    """The look at an optimizer's first estimate, or at the first whose losses are finite.

    Attributes:
        rows_mix: every probe needs a forward of its own.
        rows_apart: rows were seen not to mix; :meth:`parts` finds out where that has not been looked at.
    """

    def __init__(self):
        self.rows_mix = self.rows_apart = self._done = False

    def __call__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        loss_fn: Callable,
        *,
        eps: float,
        others: InPlace | Streamed | None,
        heads: Sequence[nn.Module],
        planner: Planner,
        shares: bool = False,
        **settings,
    ) -> None:
        """Look, unless it has been done.

        Args:
            batch: the examples.
            loss_fn: maps an expanded batch to one loss per row.
            eps: distance of a probe.
            others, heads, planner, settings: as for ``evaluate_probes``.
            shares: blocks run once per example, which also counts on rows that do not mix.

        Raises:
            ValueError: a streamed parameter's stored value is read, which is not perturbed.
        """
        if self._done:
            return
        if isinstance(others, Streamed):
            check_streamed(others, batch, loss_fn, eps=eps)
        if (others is None or heads) and (shares or planner.probes_per_forward != 1):
            with others or nullcontext():
                mix = rows_mix(model, batch, loss_fn, eps=eps, others=others, heads=heads, **settings)
            if mix is None:
                return
            self.rows_mix, self.rows_apart = mix, not mix
        self._done = True

    def parts(self, model: nn.Module, batch: Mapping[str, Any], loss_fn: Callable) -> bool:
        """Tell whether the rows of a probe may pass in parts, by a look at two of them where there was none yet.

        Asked when memory runs out, with the parameters wherever they are: nothing is moved.
        """
        if not self.rows_mix and not self.rows_apart:
            token = looking.set(True)
            try:
                beside, alike = (loss_fn(take_rows(batch, torch.tensor(rows)))[:1].float() for rows in ([0, 1], [0, 0]))
            finally:
                looking.reset(token)
            self.rows_apart = bool(torch.isfinite(alike).all()) and _equal(beside, alike, model)
        return self.rows_apart


def check_streamed(streamed: Streamed, batch: Mapping[str, Any], loss_fn: Callable, *, eps: float) -> None:
    """Run ``ROWS`` rows and raise ``ValueError`` if a parameter's stored value is read: it would not be perturbed."""
    with streamed, streamed.checked():
        streamed.move_to(0, eps)
        loss_fn(take_rows(batch, torch.arange(min(ROWS, batch_size(batch)))))
