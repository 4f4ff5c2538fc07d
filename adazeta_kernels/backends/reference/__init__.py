"""Plain torch on any device: the float64-capable oracle of every op, and the fallback where nothing faster runs."""

from __future__ import annotations

from adazeta_kernels.backends.reference.rng import fill_normal_, perturb_, perturb_rows
from adazeta_kernels.backends.reference.tt import low_rank_linear, tt_adapter, tt_factors, tt_linear

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


def unavailable() -> str | None:
    """The reference runs wherever torch does."""
    return None


def supports(op: str, **args) -> str | None:
    """The reference runs every op for every dtype that passes the checks."""
    return None
