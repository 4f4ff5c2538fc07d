"""fill_normal_ in Triton: out[i] <- element offset + i of the direction of one seed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adazeta_kernels.backends.triton import elementwise, launch, tuning
from adazeta_kernels.backends.triton.elementwise import DISTRIBUTIONS, DTYPES
from adazeta_kernels.backends.triton.rng import direction_tile, split_seed
from adazeta_kernels.backends.triton.tile import store_tile, tile_count, tile_start


@triton.jit(do_not_specialize=["out", "numel", "offset", "seed"])
def fill_normal_kernel(
    out: tl.int64,
    numel: tl.int64,
    offset: tl.int64,
    seed: tl.int64,
    DTYPE: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    base, position = tile_start(offset, tl.program_id(0), BLOCK)
    seed_lo, seed_hi = split_seed(seed)
    z = direction_tile(seed_lo, seed_hi, base, DISTRIBUTION, BLOCK, GROUP)
    store_tile(out, position, numel, z, DTYPE, BLOCK)


def fill_normal_(
    out: torch.Tensor,
    seed: int,
    offset: int,
    distribution: str,
    *,
    configuration: launch.Configuration | None = None,
) -> None:
    """out[i] <- z(seed)[offset + i]. `configuration` forces one; the result is the same under all."""
    if not out.numel():
        return
    configuration = configuration or _choose(out, distribution)
    _run(out, seed - 2**64 if seed >= 2**63 else seed, offset, distribution, configuration)


def _run(out, seed, offset, distribution, configuration):
    programs = tile_count(offset, out.numel(), configuration["BLOCK"])
    arguments = (out.data_ptr(), out.numel(), offset, seed)
    codes = {"DTYPE": DTYPES[out.dtype], "DISTRIBUTION": DISTRIBUTIONS[distribution]}
    launch.launch(fill_normal_kernel, programs, out.device, configuration, *arguments, **codes)


def _choose(out, distribution):
    numel = elementwise.measured_numel(out.numel())

    def prepare():
        scratch = torch.empty(numel, dtype=out.dtype, device=out.device)
        return lambda configuration: _run(scratch, 1, 0, distribution, configuration)

    candidates = elementwise.candidates(DTYPES[out.dtype], out.device, out.numel())
    return tuning.choose(f"fill_normal_ {out.dtype} {distribution}", (numel,), candidates, out.device, prepare)


def specimens() -> list[launch.Specimen]:
    signature = dict.fromkeys(("out", "numel", "offset", "seed"), "i64")
    return elementwise.specimens("fill_normal", fill_normal_kernel, signature, DTYPES.values())
