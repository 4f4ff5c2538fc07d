"""perturb_ in Triton: theta <- decay theta + sum_j scales[j] z(seeds[j]), one launch for any list of tensors and seeds.

A table of 64-bit words goes to the device: for each of T tensors its first tile, address, length, index of the first
element and dtype (column after column), then the seeds, then the bits of the scales.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from adazeta_kernels.backends.triton import elementwise, launch, tuning
from adazeta_kernels.backends.triton.compat import BFLOAT16, FLOAT16, FLOAT32, fma, span
from adazeta_kernels.backends.triton.elementwise import DISTRIBUTIONS, DTYPES
from adazeta_kernels.backends.triton.rng import direction_tile, split_seed
from adazeta_kernels.backends.triton.tile import load_tile, store_tile, tile_count, tile_start

MIXED = tl.constexpr(3)  # each tensor tells its own dtype


@triton.jit(do_not_specialize=["table", "tensors", "seeds", "decay"])
def perturb_kernel(
    table: tl.int64,
    tensors: tl.int64,
    seeds: tl.int64,
    decay,
    DTYPE: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    words = table.to(tl.pointer_type(tl.int64))
    tile = tl.program_id(0).to(tl.int64)
    # The last tensor that begins at or before this tile.
    low = tile * 0
    high = low + tensors
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(words + middle) <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    tile -= tl.load(words + low)
    address = tl.load(words + tensors + low)
    numel = tl.load(words + 2 * tensors + low)
    base, position = tile_start(tl.load(words + 3 * tensors + low), tile, BLOCK)
    if DTYPE == MIXED:
        dtype = tl.load(words + 4 * tensors + low)
        if dtype == FLOAT32:
            acc = load_tile(address, position, numel, FLOAT32, BLOCK)
        elif dtype == BFLOAT16:
            acc = load_tile(address, position, numel, BFLOAT16, BLOCK)
        else:
            acc = load_tile(address, position, numel, FLOAT16, BLOCK)
    else:
        acc = load_tile(address, position, numel, DTYPE, BLOCK)
    acc = acc * decay  # exact where decay is 1
    seed_words = words + 5 * tensors
    for j in span(0, seeds):
        seed_lo, seed_hi = split_seed(tl.load(seed_words + j))
        scale = tl.load(seed_words + seeds + j).to(tl.int32).to(tl.float32, bitcast=True)
        z = direction_tile(seed_lo, seed_hi, base, DISTRIBUTION, BLOCK, GROUP)
        acc = fma(z, scale, acc)
    if DTYPE == MIXED:
        if dtype == FLOAT32:
            store_tile(address, position, numel, acc, FLOAT32, BLOCK)
        elif dtype == BFLOAT16:
            store_tile(address, position, numel, acc, BFLOAT16, BLOCK)
        else:
            store_tile(address, position, numel, acc, FLOAT16, BLOCK)
    else:
        store_tile(address, position, numel, acc, DTYPE, BLOCK)


def perturb_(
    params: list[torch.Tensor],
    seeds: torch.Tensor,
    scales: torch.Tensor,
    offset: int,
    decay: float,
    distribution: str,
    *,
    configuration: launch.Configuration | None = None,
) -> None:
    """theta <- decay theta + sum_j scales[j] z(seeds[j]), theta being the concatenation of `params`.

    `configuration` forces one; the result is the same under all.
    """
    numels = np.array([p.numel() for p in params], np.int64)
    first = offset + (np.cumsum(numels) - numels)
    present = np.flatnonzero(numels)
    if not present.size:
        return
    params, numels, first = [params[i] for i in present], numels[present], first[present]
    scales = scales.contiguous()
    added = scales != 0  # a scale of 0 adds nothing, not even the sign of a zero
    if not added.all():
        seeds, scales = seeds[added], scales[added]
    configuration = configuration or _choose(params, int(numels.sum()), len(seeds), distribution)
    _run(params, numels, first, seeds, scales, decay, distribution, configuration)


def _run(params, numels, first, seeds, scales, decay, distribution, configuration):
    count, block = len(params), configuration["BLOCK"]
    table = np.empty(5 * count + 2 * len(seeds), np.int64)
    columns = table[: 5 * count].reshape(5, count)
    tiles = [tile_count(index, numel, block) for index, numel in zip(first.tolist(), numels.tolist())]
    columns[0] = np.cumsum(tiles) - tiles
    columns[1] = [p.data_ptr() for p in params]
    columns[2], columns[3] = numels, first
    columns[4] = [DTYPES[p.dtype] for p in params]
    table[5 * count :][: len(seeds)] = seeds.numpy()
    table[5 * count + len(seeds) :] = scales.numpy().view(np.int32)
    device = params[0].device
    on_device = launch.to_device(torch.from_numpy(table), device)
    arguments = (on_device.data_ptr(), count, len(seeds), float(np.float32(decay)))
    codes = {"DTYPE": _dtype(params), "DISTRIBUTION": DISTRIBUTIONS[distribution]}
    launch.launch(perturb_kernel, sum(tiles), device, configuration, *arguments, **codes)


def _dtype(params):
    dtypes = {p.dtype for p in params}
    return DTYPES[dtypes.pop()] if len(dtypes) == 1 else MIXED.value


def _choose(params, numel, seed_count, distribution):
    dtype, device = _dtype(params), params[0].device
    numel = elementwise.measured_numel(numel)
    seed_count = min(*launch.shape_class(seed_count), 32)

    def prepare():
        dtypes = DTYPES if dtype == MIXED.value else [params[0].dtype]
        scratch = [torch.zeros(-(-numel // len(dtypes)), dtype=d, device=device) for d in dtypes]
        numels = np.array([s.numel() for s in scratch], np.int64)
        seeds, scales = torch.arange(seed_count), torch.ones(seed_count)
        lists = (scratch, numels, np.cumsum(numels) - numels, seeds, scales)
        return lambda configuration: _run(*lists, 1.0, distribution, configuration)

    candidates = elementwise.candidates(dtype, device, numel)
    return tuning.choose(f"perturb_ {dtype} {distribution}", (numel, seed_count), candidates, device, prepare)


def specimens() -> list[launch.Specimen]:
    signature = {"table": "i64", "tensors": "i64", "seeds": "i64", "decay": "fp32"}
    return elementwise.specimens("perturb", perturb_kernel, signature, [*DTYPES.values(), MIXED.value])
