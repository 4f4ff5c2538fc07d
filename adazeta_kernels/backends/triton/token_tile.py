"""A tile of tokens of one probe times factors of that probe: narrow to the rank, and wide again.

    h = project(x, left)                     (tokens, d) (d, rank), one pass over x
    y = expand: base + h right + bias        (tokens, rank) (rank, d), one pass over base and y

Blocks are padded with zeros to RANK columns: a power of two of at least 16, the least depth of a tensor core. An
infinite number times a zero of that padding is NaN, so what pads a result is set to zero.
"""

from __future__ import annotations

import triton.language as tl

from adazeta_kernels.backends.triton.compat import BFLOAT16, FLOAT16, FLOAT32, helper, narrow, span, widen
from adazeta_kernels.backends.triton.products import parts, parts_of, product

# What a launch does: all of it; or only a part of the projection; or what follows the projection.
WHOLE = tl.constexpr(0)
PROJECT = tl.constexpr(1)
FINISH = tl.constexpr(2)


@helper
def tile_of_program(tokens, SPLITS: tl.constexpr, TOKENS: tl.constexpr):
    """Of this program: probe and first token of its tile, number of the tile, and which part of the columns it has."""
    program = tl.program_id(0)
    tile = program // SPLITS
    tiles = tl.cdiv(tokens, TOKENS)
    return (tile // tiles).to(tl.int64), (tile % tiles) * TOKENS, tile.to(tl.int64), program % SPLITS


@helper
def columns_of_part(d, part, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """First column and end of a part of d columns, in whole blocks of BLOCK."""
    size = tl.cdiv(tl.cdiv(d, BLOCK), SPLITS) * BLOCK
    return part * size, tl.minimum(d, (part + 1) * size)


@helper
def project(
    x,
    present,
    left,
    begin,
    end,
    rank,
    DTYPE: tl.constexpr,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Columns begin .. end - 1 of x times the same rows of left (d, rank): (TOKENS, RANK), float32.

    Args:
        x: pointers (TOKENS, 1) to the first numbers of the tokens.
        present: (TOKENS, 1), False for tokens beyond the last, which are taken as zeros.
        left: pointer to float32.
        DEPTH: columns whose products are summed on the tensor cores, which truncate, before the float32 sum.
    """
    h = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    ranks = tl.arange(0, RANK)[None, :]
    for first in span(begin, end, DEPTH):
        columns = first + tl.arange(0, DEPTH)
        block = tl.load(x + columns[None, :], mask=present & (columns < end)[None, :], other=0.0)
        rows = columns[:, None]
        factor = tl.load(left + rows * rank + ranks, mask=(rows < end) & (ranks < rank), other=0.0)
        x0, x1, x2 = parts_of(block, DTYPE)
        l0, l1, l2 = parts(factor)
        found = product(x0, x1, x2, l0, l1, l2, 3 if DTYPE == FLOAT32 else (2 if DTYPE == FLOAT16 else 1))
        h += tl.where(ranks < rank, found, 0.0) if DTYPE == BFLOAT16 else found
    # For each dtype where ptxas spills nowhere: on sm_100 one variant loses 8 bytes if all do it here, two if none do.
    return h if DTYPE == BFLOAT16 else tl.where(ranks < rank, h, 0.0)


@helper
def expand(
    base,
    y,
    present,
    h,
    right,
    bias,
    scale,
    begin,
    end,
    d,
    rank,
    HAS_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Columns begin .. end - 1 of y <- base + h right + scale bias, rounded once.

    From the last column to the first: where base is what was just projected, its end is still in the cache.

    Args:
        base, y: pointers (TOKENS, 1) to the first numbers of the tokens.
        h: (TOKENS, RANK), float32.
        right, bias: pointers to float32, (rank, d) and (d,).
    """
    h0, h1, h2 = parts(h)
    ranks = tl.arange(0, RANK)[:, None]
    blocks = tl.cdiv(end - begin, WIDTH)
    for block in span(0, blocks, 1):
        columns = begin + (blocks - 1 - block) * WIDTH + tl.arange(0, WIDTH)
        inside = (columns < end)[None, :]
        if HAS_BASE:
            residual = tl.load(base + columns[None, :], mask=present & inside, other=0.0)
        factor = tl.load(right + ranks * d + columns[None, :], mask=(ranks < rank) & inside, other=0.0)
        r0, r1, r2 = parts(factor)
        out = product(h0, h1, h2, r0, r1, r2, 3, DTYPE != FLOAT32)
        if HAS_BIAS:
            out += (scale * tl.load(bias + columns, mask=columns < end, other=0.0))[None, :]
        if HAS_BASE:
            out += widen(residual)
        tl.store(y + columns[None, :], narrow(out, DTYPE), mask=present & inside)


@helper
def store_partial(h, partial, tile, part, SPLITS: tl.constexpr, TOKENS: tl.constexpr, RANK: tl.constexpr):
    """Keep what one part of the columns projects to; `partial` is (tiles, SPLITS, TOKENS, RANK)."""
    at = tl.arange(0, TOKENS)[:, None] * RANK + tl.arange(0, RANK)[None, :]
    tl.store(partial + (tile * SPLITS + part) * (TOKENS * RANK) + at, h)


@helper
def sum_partials(partial, tile, SPLITS: tl.constexpr, TOKENS: tl.constexpr, RANK: tl.constexpr):
    """The whole projection, summed in the order of the columns: the same bits in every run."""
    at = tl.arange(0, TOKENS)[:, None] * RANK + tl.arange(0, RANK)[None, :]
    partial += tile * (SPLITS * TOKENS * RANK)
    h = tl.load(partial + at)
    for part in range(1, SPLITS):
        h += tl.load(partial + part * (TOKENS * RANK) + at)
    return h
