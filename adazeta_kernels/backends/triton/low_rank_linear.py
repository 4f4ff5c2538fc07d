"""low_rank_linear in Triton, and the kernel of tt_linear: y = base + scale ((x L) R + bias), factors per probe."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adazeta_kernels.backends.native_cuda import dense_rows
from adazeta_kernels.backends.triton import launch, token_launch
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


@triton.jit(do_not_specialize=["tokens", "rank", "left_stride", "right_stride", "bias_stride"])
def low_rank_kernel(
    x,
    base,
    y,
    left,
    right,
    bias,
    partial,
    tokens,
    d_in,
    d_out,
    rank,
    left_stride,
    right_stride,
    bias_stride,
    scale,
    STAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    probe, token, tile, part = tile_of_program(tokens, SPLITS, TOKENS)
    rows = token + tl.arange(0, TOKENS)[:, None]
    present = rows < tokens
    row = probe * tokens + rows
    if STAGE == FINISH:
        h = sum_partials(partial, tile, SPLITS, TOKENS, RANK)
    else:
        begin, end = columns_of_part(d_in, part, SPLITS, DEPTH)
        x += row * d_in
        h = project(x, present, left + probe * left_stride, begin, end, rank, DTYPE, TOKENS, RANK, DEPTH)
    if STAGE == PROJECT:
        store_partial(h, partial, tile, part, SPLITS, TOKENS, RANK)
    else:
        begin, end = columns_of_part(d_out, part, SPLITS, WIDTH)
        y += row * d_out
        if HAS_BASE:
            base += row * d_out
        if HAS_BIAS:
            bias += probe * bias_stride
        right += probe * right_stride
        h *= scale
        expand(base, y, present, h, right, bias, scale, begin, end, d_out, rank, HAS_BASE, HAS_BIAS, DTYPE, RANK, WIDTH)


def low_rank_linear(
    x: torch.Tensor,
    base: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    *,
    configuration: launch.Configuration | None = None,
    shares: int | None = None,
) -> torch.Tensor:
    """`base + scale * (x A) B`; see ops.low_rank_linear. `configuration` and `shares` as in tt_adapter."""
    return run(x, base.contiguous(), A, B, None, scale, configuration, shares)


def run(x, base, left, right, bias, scale, configuration=None, shares=None) -> torch.Tensor:
    """`base + scale ((x left) right + bias)`; base and bias may be None."""
    x, left, right = x.contiguous(), dense_rows(left), dense_rows(right)
    bias = None if bias is None else dense_rows(bias)
    rank, d_out = right.shape[1:]
    y = x.new_empty((*x.shape[:2], d_out))
    if not y.numel():
        return y

    def arguments(partial):
        strides = (left.stride(0), right.stride(0), 0 if bias is None else bias.stride(0))
        return (x, base, y, left, right, bias, partial, *x.shape[1:], d_out, rank, *strides, scale)

    codes = {"HAS_BASE": base is not None, "HAS_BIAS": bias is not None}
    ranks = {"RANK": token_launch.padded(rank)}
    token_launch.run("low_rank", low_rank_kernel, x, d_out, ranks, arguments, codes, configuration, shares)
    return y


def specimens() -> list[launch.Specimen]:
    """With both a base and a bias: more than either op has."""
    pointers = {"x": "*x", "base": "*x", "y": "*x"} | dict.fromkeys(("left", "right", "bias", "partial"), "*fp32")
    sizes = ("tokens", "d_in", "d_out", "rank", "left_stride", "right_stride", "bias_stride")
    signature = pointers | dict.fromkeys(sizes, "i32") | {"scale": "fp32"}
    codes = {"HAS_BASE": True, "HAS_BIAS": True}
    return token_launch.specimens("low_rank", low_rank_kernel, signature, ("d_in", "d_out"), ("RANK",), codes)
