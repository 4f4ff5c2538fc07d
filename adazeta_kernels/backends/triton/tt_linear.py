"""tt_linear in Triton: y = (x L) R + bias, the kernel of low_rank_linear without a base."""

from __future__ import annotations

import torch

from adazeta_kernels.backends.triton import launch
from adazeta_kernels.backends.triton.low_rank_linear import run


def tt_linear(
    x: torch.Tensor,
    L: torch.Tensor,
    R: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    configuration: launch.Configuration | None = None,
    shares: int | None = None,
) -> torch.Tensor:
    """`(x L) R + bias`; see ops.tt_linear. `configuration` and `shares` as in tt_adapter."""
    return run(x, None, L, R, bias, 1.0, configuration, shares)
