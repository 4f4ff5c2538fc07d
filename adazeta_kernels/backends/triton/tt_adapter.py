"""tt_adapter in Triton: y = x + scale ((act((x L1) R1 + b1) L2) R2 + b2), one pass over x, factors per probe."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adazeta_kernels.backends.native_cuda import dense_rows
from adazeta_kernels.backends.triton import launch, token_launch
from adazeta_kernels.backends.triton.activation import ACTS, activate
from adazeta_kernels.backends.triton.compat import helper, span
from adazeta_kernels.backends.triton.products import parts, product
from adazeta_kernels.backends.triton.token_tile import (
    FINISH,
    PROJECT,
    columns_of_part,
    expand,
    project,
    store_partial,
    sum_partials,
    tile_of_program,
)
from adazeta_kernels.layout import TTAdapterLayout

BOTTLENECK = 16  # columns of the bottleneck in one block, for few registers


@helper
def narrow_part(
    h,
    right,
    bias,
    left,
    bottleneck,
    rank_down,
    rank_up,
    ACT: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    RANK_DOWN: tl.constexpr,
    RANK_UP: tl.constexpr,
    BOTTLENECK: tl.constexpr,
):
    """act(h right + bias) left, (TOKENS, RANK_UP), in blocks of BOTTLENECK columns of the bottleneck."""
    h0, h1, h2 = parts(h)
    g = tl.zeros((TOKENS, RANK_UP), dtype=tl.float32)
    downs = tl.arange(0, RANK_DOWN)[:, None]
    ups = tl.arange(0, RANK_UP)[None, :]
    for first in span(0, bottleneck, BOTTLENECK, num_stages=1):  # too short to be worth a pipeline
        k = first + tl.arange(0, BOTTLENECK)
        inside = k < bottleneck
        factor = tl.load(right + downs * bottleneck + k[None, :], mask=(downs < rank_down) & inside[None, :], other=0.0)
        r0, r1, r2 = parts(factor)
        u = product(h0, h1, h2, r0, r1, r2, 3)
        if BIAS:
            u += tl.load(bias + k, mask=inside, other=0.0)[None, :]
        # Activations of 0 are 0. Masked behind them instead, one variant spills on sm_100.
        u0, u1, u2 = parts(activate(tl.where(inside[None, :], u, 0.0), ACT))
        factor = tl.load(left + k[:, None] * rank_up + ups, mask=inside[:, None] & (ups < rank_up), other=0.0)
        l0, l1, l2 = parts(factor)
        g += product(u0, u1, u2, l0, l1, l2, 3)
    return tl.where(ups < rank_up, g, 0.0)


@triton.jit(do_not_specialize=["tokens", "bottleneck", "rank_down", "rank_up", "factor_stride"])
def tt_adapter_kernel(
    x,
    y,
    factors,
    partial,
    tokens,
    width,
    bottleneck,
    rank_down,
    rank_up,
    factor_stride,
    scale,
    STAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    ACT: tl.constexpr,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    RANK_DOWN: tl.constexpr,
    RANK_UP: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BOTTLENECK: tl.constexpr,
):
    probe, token, tile, part = tile_of_program(tokens, SPLITS, TOKENS)
    rows = token + tl.arange(0, TOKENS)[:, None]
    present = rows < tokens
    start = (probe * tokens + rows) * width
    left_down = factors + probe * factor_stride
    right_down = left_down + width * rank_down
    bias_down = right_down + rank_down * bottleneck
    left_up = bias_down + (bottleneck if BIAS else 0)
    right_up = left_up + bottleneck * rank_up
    bias_up = right_up + rank_up * width
    if STAGE == FINISH:
        h = sum_partials(partial, tile, SPLITS, TOKENS, RANK_DOWN)
    else:
        begin, end = columns_of_part(width, part, SPLITS, DEPTH)
        h = project(x + start, present, left_down, begin, end, rank_down, DTYPE, TOKENS, RANK_DOWN, DEPTH)
    if STAGE == PROJECT:
        store_partial(h, partial, tile, part, SPLITS, TOKENS, RANK_DOWN)
    else:
        g = narrow_part(
            h,
            right_down,
            bias_down,
            left_up,
            bottleneck,
            rank_down,
            rank_up,
            ACT,
            BIAS,
            TOKENS,
            RANK_DOWN,
            RANK_UP,
            BOTTLENECK,
        )
        begin, end = columns_of_part(width, part, SPLITS, WIDTH)
        expand(
            x + start,
            y + start,
            present,
            g * scale,
            right_up,
            bias_up,
            scale,
            begin,
            end,
            width,
            rank_up,
            True,
            BIAS,
            DTYPE,
            RANK_UP,
            WIDTH,
        )


def tt_adapter(
    x: torch.Tensor,
    factors: torch.Tensor,
    layout: TTAdapterLayout,
    act: str,
    scale: float,
    overwrite: bool = False,
    *,
    configuration: launch.Configuration | None = None,
    shares: int | None = None,
) -> torch.Tensor:
    """`x + scale * up(act(down(x)))`; see ops.tt_adapter. x is never overwritten.

    `configuration` forces one, `shares` how many programs split the width of a tile.
    """
    x, factors = x.contiguous(), dense_rows(factors)
    y = torch.empty_like(x)
    if not y.numel():
        return y
    down, up = layout.down.bond, layout.up.bond

    def arguments(partial):
        sizes = (x.shape[1], layout.width, layout.bottleneck, down, up, factors.stride(0))
        return (x, y, factors, partial, *sizes, scale)

    ranks = {"RANK_DOWN": token_launch.padded(down), "RANK_UP": token_launch.padded(up)}
    codes = {"ACT": ACTS[act], "BIAS": layout.bias, "BOTTLENECK": BOTTLENECK}
    token_launch.run("tt_adapter", tt_adapter_kernel, x, layout.width, ranks, arguments, codes, configuration, shares)
    return y


def specimens() -> list[launch.Specimen]:
    """With the activation that takes most."""
    signature = dict.fromkeys(("x", "y"), "*x") | {"factors": "*fp32", "partial": "*fp32"}
    sizes = ("tokens", "width", "bottleneck", "rank_down", "rank_up", "factor_stride")
    signature |= dict.fromkeys(sizes, "i32") | {"scale": "fp32"}

    codes = {"ACT": ACTS["gelu"], "BIAS": True, "BOTTLENECK": BOTTLENECK}
    return token_launch.specimens(
        "tt_adapter", tt_adapter_kernel, signature, ("width",), ("RANK_DOWN", "RANK_UP"), codes
    )
