"""The ops as Triton kernels, for any GPU that Triton serves. Arguments are validated, as in `native`.

Kernels run on tensors on a GPU; under Triton's interpreter, which is for tests (TRITON_INTERPRET=1 before anything
imports triton), on CPU tensors.
"""

from __future__ import annotations

import torch

try:
    import triton
except ImportError as error:
    _IMPORT_ERROR = str(error)
    triton = None
else:
    from adazeta_kernels.backends.triton.compat import INTERPRETED
    from adazeta_kernels.backends.triton.fill_normal import fill_normal_
    from adazeta_kernels.backends.triton.low_rank_linear import low_rank_linear
    from adazeta_kernels.backends.triton.perturb import perturb_
    from adazeta_kernels.backends.triton.perturb_rows import perturb_rows
    from adazeta_kernels.backends.triton.token_launch import MAX_RANK
    from adazeta_kernels.backends.triton.tt_adapter import tt_adapter
    from adazeta_kernels.backends.triton.tt_factors import tt_factors
    from adazeta_kernels.backends.triton.tt_linear import tt_linear

__all__ = [
    "fill_normal_",
    "low_rank_linear",
    "perturb_",
    "perturb_rows",
    "supports",
    "tt_adapter",
    "tt_factors",
    "tt_linear",
    "unavailable",
]

_FLOAT32_ONLY = ("perturb_rows", "tt_factors")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """None, or why no Triton kernel can run: not installed, or no driver for a GPU."""
    if triton is None:
        return f"triton does not load ({_IMPORT_ERROR})"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return f"triton {triton.__version__} has no driver to run on: torch {torch.__version__} sees no GPU"
    try:
        triton.runtime.driver.active.get_current_target()
    except RuntimeError as error:
        return f"triton {triton.__version__} has no driver to run on: {error}"
    return None


def supports(op: str, *, device: str, dtype: torch.dtype, rank: int = 0, **sizes: int) -> str | None:
    """None, or why the Triton kernels do not run `op` on such tensors; `rank` is the largest bond between L and R."""
    if device != ("cpu" if INTERPRETED else "cuda"):
        where = "the CPU under its interpreter" if INTERPRETED else "a GPU"
        return f"Triton kernels run on {where}, not on {device}"
    if dtype not in _DTYPES or (op in _FLOAT32_ONLY and dtype != torch.float32):
        return f"no Triton kernel of {op} for {dtype}"
    if rank > MAX_RANK:
        return f"rank {rank} is above the Triton kernels' limit of {MAX_RANK}"
    return None
