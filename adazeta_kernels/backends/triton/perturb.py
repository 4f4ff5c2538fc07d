"""perturb_ in Triton: theta <- decay theta + sum_j scales[j] z(seeds[j]), one launch for any list of tensors and seeds.

A table of 64-bit words goes to the device: for each of T tensors its first tile, address, length, index of the first
element and dtype (column after column), then the seeds, then the bits of the scales.
"""

from __future__ import annotations

from array import array

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
    words = table.to(tl.int64).to(tl.pointer_type(tl.int64))
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
    params = [p for p in params if p.numel()]
    if not params:
        return
    # A scale of 0 adds nothing, not even the sign of a zero: its seed is left out. Scales travel as their bits.
    pairs = zip(seeds.tolist(), scales.contiguous().view(torch.int32).tolist())
    terms = [(seed, bits) for seed, bits in pairs if bits & 0x7FFFFFFF]
    configuration = configuration or _choose(params, len(terms), distribution)
    _run(params, terms, offset, decay, distribution, configuration)


def _run(params, terms, offset, decay, distribution, configuration):
    block, numels = configuration["BLOCK"], [p.numel() for p in params]
    tiles, first, tile, index = [], [], 0, offset
    for numel in numels:
        tiles.append(tile)
        first.append(index)
        tile += tile_count(index, numel, block)
        index += numel
    addresses, dtypes = [p.data_ptr() for p in params], [DTYPES[p.dtype] for p in params]
    directions = [*(seed for seed, _ in terms), *(bits for _, bits in terms)]
    words = array("q", [*tiles, *addresses, *numels, *first, *dtypes, *directions])
    device = params[0].device
    on_device = launch.to_device(torch.frombuffer(words, dtype=torch.int64), device)
    arguments = (on_device.data_ptr(), len(params), len(terms), _float32(decay))
    codes = {"DTYPE": _dtype(params), "DISTRIBUTION": DISTRIBUTIONS[distribution]}
    launch.launch(perturb_kernel, tile, device, configuration, *arguments, **codes)


def _float32(number):
    """The number rounded to float32, infinite where it is too large, as every backend takes it."""
    return number if number == 1.0 else torch.tensor(number, dtype=torch.float32, device="cpu").item()


def _dtype(params):
    dtypes = {p.dtype for p in params}
    return DTYPES[dtypes.pop()] if len(dtypes) == 1 else MIXED.value


def _choose(params, seed_count, distribution):
    dtype, device = _dtype(params), params[0].device
    numel = elementwise.measured_numel(sum(p.numel() for p in params))
    seed_count = min(*launch.shape_class(seed_count), 32)

    def prepare():
        dtypes = DTYPES if dtype == MIXED.value else [params[0].dtype]
        scratch = [torch.zeros(-(-numel // len(dtypes)), dtype=d, device=device) for d in dtypes]
        terms = [(seed, 0x3F800000) for seed in range(seed_count)]  # scales of 1
        return lambda configuration: _run(scratch, terms, 0, 1.0, distribution, configuration)

    candidates = elementwise.candidates(dtype, device, numel)
    return tuning.choose(f"perturb_ {dtype} {distribution}", (numel, seed_count), candidates, device, prepare)


def specimens() -> list[launch.Specimen]:
    signature = {"table": "i64", "tensors": "i64", "seeds": "i64", "decay": "fp32"}
    return elementwise.specimens("perturb", perturb_kernel, signature, [*DTYPES.values(), MIXED.value])
