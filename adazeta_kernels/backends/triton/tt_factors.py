"""tt_factors in Triton: the contracted cores of theta + scales[p] z(seeds[p]), all adapters and probes in two launches.

A program has one of the four chains of cores (L and R of both maps) of one adapter at one probe. The first launch
perturbs the cores, and the biases right into the result; the second contracts the cores as tt_plan.py lays out; theta
is only read. One launch would need a barrier between its writes and reads, and Triton's orders no global memory on AMD.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adazeta_kernels.backends.triton import launch, token_launch, tt_plan, tuning
from adazeta_kernels.backends.triton.compat import INTERPRETED, fma, helper, span
from adazeta_kernels.backends.triton.elementwise import DISTRIBUTIONS
from adazeta_kernels.backends.triton.products import parts, product
from adazeta_kernels.backends.triton.rng import direction_tile, split_seed
from adazeta_kernels.layout import TTAdapterLayout

# Elements that are perturbed at once; to the interpreter any number is the same work.
BLOCK = 1 << 14 if INTERPRETED else 512

_BEGIN, _CORES, _COUNT, _OUT, _ROWS, _COLUMNS, _CUT, _HEAD, _SIDE_HEAD, _CORE = (
    tl.constexpr(getattr(tt_plan, name))
    for name in ("BEGIN", "CORES", "COUNT", "OUT", "ROWS", "COLUMNS", "CUT", "HEAD", "SIDE_HEAD", "CORE")
)
_RANK_DIVISOR, _RANK_MODULUS, _RANK_STRIDE, _STEPS = (
    tl.constexpr(getattr(tt_plan, name)) for name in ("RANK_DIVISOR", "RANK_MODULUS", "RANK_STRIDE", "STEPS")
)
_OFFSET, _DIMENSION, _DIVISOR, _DIGIT_STRIDE, _SUM_STRIDE, _OUT_STRIDE, _SUM_RANK, _OUT_RANK = (
    tl.constexpr(getattr(tt_plan, name))
    for name in (
        "OFFSET",
        "DIMENSION",
        "DIVISOR",
        "DIGIT_STRIDE",
        "SUM_STRIDE",
        "OUT_STRIDE",
        "SUM_RANK",
        "OUT_RANK",
    )
)


@helper
def _core_rows(index, core):
    """Where the numbers that belong to rows `index` (n,) begin in a core."""
    digit = (index // tl.load(core + _DIVISOR)) % tl.load(core + _DIMENSION)
    return tl.load(core + _OFFSET) + digit * tl.load(core + _DIGIT_STRIDE)


@helper
def _side(index, cores, side, RANK: tl.constexpr):
    """Rows `index` of the left side of a chain, or columns of its right side: (n, RANK), zeros beyond the rank.

    Numbers beyond the last give rows that the caller drops.
    """
    ranks = tl.arange(0, RANK)[None, :]
    core = side + _SIDE_HEAD
    outer = (index // tl.load(side + _RANK_DIVISOR)) % tl.load(side + _RANK_MODULUS)
    begin = _core_rows(index, core) + outer * tl.load(side + _RANK_STRIDE)
    at = begin[:, None] + ranks * tl.load(core + _OUT_STRIDE)
    v = tl.load(cores + at, mask=ranks < tl.load(core + _OUT_RANK), other=0.0)
    for _ in span(0, tl.load(side + _STEPS), 1):
        core += _CORE
        stride, inside = tl.load(core + _SUM_STRIDE), ranks < tl.load(core + _OUT_RANK)
        at = _core_rows(index, core)[:, None] + ranks * tl.load(core + _OUT_STRIDE)
        total = tl.zeros_like(v)
        for k in span(0, tl.load(core + _SUM_RANK), 1):
            factor = tl.sum(tl.where(ranks == k, v, 0.0), axis=1)[:, None]
            total = tl.fma(factor, tl.load(cores + at + k * stride, mask=inside, other=0.0), total)
        v = total
    return v


@triton.jit(do_not_specialize=["probes", "numel", "factor_numel", "scratch_numel", "side", "offset"])
def perturb_cores_kernel(
    theta,
    out,
    scratch,
    table,
    words,
    probes: tl.int64,
    numel: tl.int64,
    factor_numel: tl.int64,
    scratch_numel: tl.int64,
    side: tl.int32,
    offset: tl.int64,
    DISTRIBUTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The perturbed cores of a chain to `scratch`; its bias, behind R both in theta and in the result, to `out`.

    `words` holds the seeds, then the bits of the scales, one 64-bit word each.
    """
    program = tl.program_id(0)
    item = (program // 4).to(tl.int64)  # adapter times probes + probe
    chain = table + program % 4 * (_HEAD + 2 * side)
    rows, columns, core_count = tl.load(chain + _ROWS), tl.load(chain + _COLUMNS), tl.load(chain + _CORES)
    cores = scratch + program.to(tl.int64) * scratch_numel
    bias = out + item * factor_numel + tl.load(chain + _OUT) + rows * columns - core_count

    probe = item % probes
    seed_lo, seed_hi = split_seed(tl.load(words + probe))
    scale = tl.load(words + probes + probe).to(tl.int32).to(tl.float32, bitcast=True)
    begin = item // probes * numel + tl.load(chain + _BEGIN)
    first = offset + begin
    base = first & -4
    count, lead = tl.load(chain + _COUNT), (first - base).to(tl.int32)
    for block in span(0, count + lead, BLOCK):
        at = block - lead + tl.arange(0, BLOCK)
        inside = (at >= 0) & (at < count)
        z = direction_tile(seed_lo, seed_hi, base + block, DISTRIBUTION, BLOCK, 4)
        plain = tl.load(theta + begin + at, mask=inside, other=0.0)
        moved = tl.where(scale == 0.0, plain, fma(z, scale, plain))  # 0 changes not even the sign of a zero
        tl.store(cores + at, moved, mask=inside & (at < core_count))
        tl.store(bias + at, moved, mask=inside & (at >= core_count))


@triton.jit(do_not_specialize=["factor_numel", "scratch_numel", "side", "programs"])
def contract_kernel(
    out,
    scratch,
    table,
    factor_numel: tl.int64,
    scratch_numel: tl.int64,
    side: tl.int32,
    programs: tl.int32,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The matrix of a chain, by that many programs."""
    program, part = tl.program_id(0) // programs, tl.program_id(0) % programs
    chain = table + program % 4 * (_HEAD + 2 * side)
    out += (program // 4).to(tl.int64) * factor_numel + tl.load(chain + _OUT)
    cores = scratch + program.to(tl.int64) * scratch_numel
    rows, columns, left = tl.load(chain + _ROWS), tl.load(chain + _COLUMNS), chain + _HEAD
    for row in span(part * ROWS, rows, programs * ROWS):
        r = row + tl.arange(0, ROWS)
        a = _side(r, cores, left, RANK)
        to = out + r[:, None] * columns
        if tl.load(chain + _CUT) != 0:
            a0, a1, a2 = parts(a)
            for column in span(0, columns, COLUMNS):
                c = column + tl.arange(0, COLUMNS)
                b0, b1, b2 = parts(tl.trans(_side(c, cores, left + side, RANK)))
                inside = (r < rows)[:, None] & (c < columns)[None, :]
                tl.store(to + c[None, :], product(a0, a1, a2, b0, b1, b2, 3), mask=inside)
        else:
            c = tl.arange(0, RANK)[None, :]
            tl.store(to + c, a, mask=(r < rows)[:, None] & (c < columns))


def tt_factors(
    theta: torch.Tensor,
    layout: TTAdapterLayout,
    seeds: torch.Tensor,
    scales: torch.Tensor,
    offset: int,
    distribution: str,
    *,
    configuration: launch.Configuration | None = None,
    shares: int | None = None,
) -> torch.Tensor:
    """Factors `(A, P, F)` of theta + scales[p] z(seeds[p]), theta holding A adapters; see ops.tt_factors.

    `configuration` forces one, `shares` how many programs share a chain; the result is the same under all.
    """
    theta, plan = theta.contiguous(), tt_plan.plan(layout)
    adapters, probes = theta.numel() // layout.numel, seeds.numel()
    items = adapters * probes
    out = theta.new_empty((adapters, probes, layout.factor_numel))
    words = launch.to_device(torch.cat([seeds, scales.contiguous().view(torch.int32).long()]), theta.device)
    table = _table(layout, theta.device)
    device, rank = theta.device, token_launch.padded(plan.rank)
    scratch = theta.new_empty(4 * items * plan.scratch)
    sizes = (layout.factor_numel, plan.scratch, plan.side)
    arguments = (theta, out, scratch, table, words, probes, layout.numel, *sizes, offset)
    codes = {"DISTRIBUTION": DISTRIBUTIONS[distribution], "BLOCK": BLOCK}
    launch.launch(perturb_cores_kernel, 4 * items, device, launch.Configuration(()), *arguments, **codes)

    def contract(configuration):
        programs = _shares(device, items, plan.rows, configuration) if shares is None else shares
        arguments = (out, scratch, table, *sizes, programs)
        launch.launch(contract_kernel, 4 * items * programs, device, configuration, *arguments, RANK=rank)

    if configuration is None:
        found = candidates(rank, launch.limits(device))
        shapes = (*launch.shape_class(items, layout.factor_numel, plan.rows), rank)
        configuration = tuning.choose("tt_factors", shapes, found, device, lambda: contract)
    contract(configuration)
    return out


def candidates(rank: int, limits: launch.Limits) -> list[launch.Configuration]:
    """Configurations for a padded rank."""
    if INTERPRETED:  # as few operations as there can be
        return [launch.Configuration((("ROWS", 256), ("COLUMNS", 512)))]
    if rank > token_launch.MAX_RANK:  # whatever registers it takes
        return [launch.Configuration((("ROWS", 16), ("COLUMNS", 16)))]
    return fitting(rank, limits)


def fitting(rank: int, limits: launch.Limits) -> list[launch.Configuration]:
    """Configurations for a GPU of such limits."""
    shapes = ((64, 64), (32, 32))
    found = (launch.Configuration((("ROWS", rows), ("COLUMNS", columns))) for rows, columns in shapes)

    def need(c):
        """Parts of both sides as operands, a block of the result that changes threads, and a side in the making."""
        rows, columns = c["ROWS"], c["COLUMNS"]
        numbers = rows * columns + 5 * max(rows, columns) * rank + 2 * rows * rank
        return launch.Limits(6 * (rows + columns) * rank + 4 * rows * columns, 64 + numbers // (32 * c.num_warps))

    return launch.configurations(found, need, limits)


def _shares(device, items, rows, configuration) -> int:
    """Programs that share a chain: enough to occupy the device, as far as there are rows."""
    wanted = 2 * token_launch.processors(device) // items
    return max(1, min(wanted, triton.cdiv(rows, configuration["ROWS"])))


_tables: dict[tuple[TTAdapterLayout, torch.device], torch.Tensor] = {}


def _table(layout, device):
    """The plan of a layout on a device, kept: but not memory of a CUDA graph, which goes with the graph."""
    key = (layout, device)
    if key in _tables:
        return _tables[key]
    table = launch.to_device(tt_plan.plan(layout).table, device)
    if not launch.capturing(device):
        _tables[key] = table
    return table


def specimens() -> list[launch.Specimen]:
    """Both kernels, for every distribution, padded rank and configuration."""
    pointers = {"theta": "*fp32", "out": "*fp32", "scratch": "*fp32", "table": "*i32", "words": "*i64"}
    sizes = dict.fromkeys(("probes", "numel", "factor_numel", "scratch_numel", "offset"), "i64") | {"side": "i32"}
    found = []
    for distribution, code in DISTRIBUTIONS.items():
        constexprs = {"DISTRIBUTION": code, "BLOCK": 512}
        label, types = f"perturb_cores {distribution}", pointers | sizes
        found.append(launch.Specimen(label, perturb_cores_kernel, types, constexprs, aligned=tuple(pointers)))
    names = ("out", "scratch", "table")
    types = {name: (pointers | sizes)[name] for name in (*names, "factor_numel", "scratch_numel", "side")}
    types["programs"] = "i32"
    for rank in token_launch.RANKS:
        for c in fitting(rank, launch.LIMITS["cuda", 90]):
            label = f"tt_factors rank={rank} {c['ROWS']}x{c['COLUMNS']}"
            constexprs = {"RANK": rank} | dict(c.sizes)
            found.append(launch.Specimen(label, contract_kernel, types, constexprs, c.num_warps, aligned=names))
    return found
