"""perturb_rows in Triton: row p of the result is theta + scales[p] z(seeds[p]), the bits that perturb_ would write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adazeta_kernels.backends.triton import elementwise, launch, tuning
from adazeta_kernels.backends.triton.compat import FLOAT32, fma
from adazeta_kernels.backends.triton.elementwise import DISTRIBUTIONS
from adazeta_kernels.backends.triton.rng import direction_tile, split_seed
from adazeta_kernels.backends.triton.tile import load_tile, store_tile, tile_count, tile_start


@triton.jit(do_not_specialize=["theta", "out", "numel", "rows", "offset", "table"])
def perturb_rows_kernel(
    theta: tl.int64,
    out: tl.int64,
    numel: tl.int64,
    rows: tl.int32,
    offset: tl.int64,
    table: tl.int64,
    DTYPE: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`table` holds the seeds, then the bits of the scales, one 64-bit word each."""
    # Rows of one tile follow each other, so that theta is read from the cache but once.
    row = tl.program_id(0) % rows
    base, position = tile_start(offset, tl.program_id(0) // rows, BLOCK)
    words = table.to(tl.int64).to(tl.pointer_type(tl.int64))
    seed_lo, seed_hi = split_seed(tl.load(words + row))
    scale = tl.load(words + rows + row).to(tl.int32).to(tl.float32, bitcast=True)
    acc = load_tile(theta, position, numel, DTYPE, BLOCK)
    if scale != 0:  # a scale of 0 adds nothing, not even the sign of a zero
        acc = fma(direction_tile(seed_lo, seed_hi, base, DISTRIBUTION, BLOCK, GROUP), scale, acc)
    store_tile(out + row.to(tl.int64) * numel * 4, position, numel, acc, DTYPE, BLOCK)


def perturb_rows(
    theta: torch.Tensor,
    seeds: torch.Tensor,
    scales: torch.Tensor,
    offset: int,
    distribution: str,
    *,
    configuration: launch.Configuration | None = None,
) -> torch.Tensor:
    """Row p of the result `(P, n)` is theta + scales[p] z(seeds[p]); float32. `configuration` forces one."""
    theta = theta.contiguous()
    out = theta.new_empty((seeds.numel(), theta.numel()))
    if out.numel():
        configuration = configuration or _choose(theta, seeds.numel(), distribution)
        _run(theta, out, seeds, scales, offset, distribution, configuration)
    return out


def _run(theta, out, seeds, scales, offset, distribution, configuration):
    rows, numel = out.shape
    table = launch.to_device(torch.cat([seeds, scales.contiguous().view(torch.int32).long()]), theta.device)
    programs = rows * tile_count(offset, numel, configuration["BLOCK"])
    arguments = (theta.data_ptr(), out.data_ptr(), numel, rows, offset, table.data_ptr())
    codes = {"DTYPE": FLOAT32.value, "DISTRIBUTION": DISTRIBUTIONS[distribution]}
    launch.launch(perturb_rows_kernel, programs, theta.device, configuration, *arguments, **codes)


def _choose(theta, rows, distribution):
    numel = elementwise.measured_numel(theta.numel())
    rows = min(*launch.shape_class(rows), 64)

    def prepare():
        scratch = torch.zeros(numel, dtype=theta.dtype, device=theta.device)
        out = scratch.new_empty((min(rows, max(1, elementwise.measured_numel(numel * rows) // numel)), numel))
        seeds = torch.arange(len(out), device="cpu")
        scales = torch.ones(len(out), dtype=torch.float32, device="cpu")
        return lambda configuration: _run(scratch, out, seeds, scales, 0, distribution, configuration)

    candidates = elementwise.candidates(FLOAT32.value, theta.device, theta.numel())
    return tuning.choose(f"perturb_rows {distribution}", (numel, rows), candidates, theta.device, prepare)


def specimens() -> list[launch.Specimen]:
    signature = dict.fromkeys(("theta", "out", "numel", "rows", "offset", "table"), "i64") | {"rows": "i32"}
    return elementwise.specimens("perturb_rows", perturb_rows_kernel, signature, [FLOAT32.value])
