"""Seeds, directions and tensor-train adapters evaluated at many perturbed points at once. Knows tensors only."""

from adazeta_kernels import backends
from adazeta_kernels.dispatch import explain
from adazeta_kernels.layout import Segment, TTAdapterLayout, TTShape
from adazeta_kernels.ops import fill_normal_, low_rank_linear, perturb_, tt_adapter, tt_factors, tt_linear
from adazeta_kernels.seeds import derive_seed, derive_seeds, derive_seeds_of_steps

__all__ = [
    "Segment",
    "TTAdapterLayout",
    "TTShape",
    "backends",
    "derive_seed",
    "derive_seeds",
    "derive_seeds_of_steps",
    "explain",
    "fill_normal_",
    "low_rank_linear",
    "perturb_",
    "tt_adapter",
    "tt_factors",
    "tt_linear",
]
