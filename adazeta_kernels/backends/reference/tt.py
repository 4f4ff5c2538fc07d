"""The TT ops in plain torch. Every function is differentiable, so `contract_cores` and `apply_adapter` also serve
first-order training of the same adapter.

Shapes: P probes, T tokens per probe, d model width, b bottleneck, r bond rank, F numbers of factors per probe.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F

from adazeta_kernels.backends.reference import rng
from adazeta_kernels.derivatives import differentiated
from adazeta_kernels.layout import TTAdapterLayout

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}

# Half-precision activations are raised to fp32 in blocks of this many elements (1 MiB), never as a whole.
_BLOCK = 1 << 18
_ROUNDED = ("tf32", "bf16")  # of torch's settings of float32 products


def _without_autocast(op):
    """The op under torch.autocast as elsewhere: it would round factors, and give results of another dtype."""

    @wraps(op)
    def run(tensor, *args):
        if not torch.amp.is_autocast_available(tensor.device.type):
            return op(tensor, *args)
        with torch.autocast(tensor.device.type, enabled=False):
            return op(tensor, *args)

    return run


@_without_autocast
def tt_factors(theta, layout, seeds, scales, offset, distribution, perturb_rows=rng.perturb_rows):
    """Perturb a copy of theta per probe and contract it. `perturb_rows` may come from a faster backend."""
    rows = probe_rows(theta, seeds, scales, offset, distribution, perturb_rows)
    wide = _dtype_of_products(theta)
    # One product per adapter, on dense rows: together with others it might sum in another order.
    parts = [part.contiguous().to(wide) for part in rows.split(layout.numel, dim=1)]
    return torch.stack([contract_cores(part, layout).to(theta.dtype) for part in parts])


def probe_rows(theta, seeds, scales, offset, distribution, perturb_rows=rng.perturb_rows):
    """`theta + scales[p] z(seeds[p])` for every probe, (P, n), with gradient 1 to theta, and its tangent."""
    plain = theta.detach()
    rows = perturb_rows(plain.contiguous(), seeds, scales, offset, distribution)
    # Adding an exact zero carries the gradient, or the tangent, without touching the values.
    return rows + (theta - plain) if differentiated(theta) else rows


def contract_cores(rows: torch.Tensor, layout: TTAdapterLayout) -> torch.Tensor:
    """Contract perturbed cores, both halves of each map, probes as the batch dimension.

    Args:
        rows: `(P, layout.numel)`, one copy of theta per probe.
        layout: where the cores lie.

    Returns:
        `(P, layout.factor_numel)`, cut by `layout.split_factors`.
    """
    parts = iter(layout.split_theta(rows))
    blocks = []
    for shape in (layout.down, layout.up):
        half = len(shape.in_factors)
        cores = [next(parts) for _ in shape.core_shapes]
        blocks += [_chain(cores[:half]), _chain(cores[half:])]
        if layout.bias:
            blocks.append(next(parts))
    return torch.cat(blocks, dim=1)


def _chain(cores):
    """Contract neighbouring cores `(P, r_left, n, r_right)` from the left: `(P, r_first * n_1 * .. * n_k * r_last)`."""
    probes, out = len(cores[0]), cores[0]
    for core in cores[1:]:
        left = core.shape[1]
        # [P, r_first n_1 .., left] @ [P, left, n r_right]
        out = torch.bmm(out.reshape(probes, -1, left), core.reshape(probes, left, -1))
    return out.reshape(probes, -1)


@_without_autocast
def tt_adapter(x, factors, layout, act, scale, overwrite=False):
    """`x + scale * up(act(down(x)))`, see ops.tt_adapter; x is never overwritten."""
    if x.dtype == (wide := _dtype_of_products(x)):
        return apply_adapter(x, factors, layout, act, scale)
    return _in_blocks(lambda xw, _, f: apply_adapter(xw, f, layout, act, scale), wide, x, None, x.shape[2], factors)


def apply_adapter(x, factors, layout, act="relu", scale=1.0):
    """Apply one adapter at every probe: `x (P, T, d)` fp32 or fp64, `factors (P, F)` from `contract_cores`.

    Of the size of x only the result is allocated.
    """
    down_l, down_r, up_l, up_r = layout.split_augmented(factors.to(x.dtype))
    h = torch.bmm(x, down_l)  # [P, T, r1]
    if layout.bias:
        h = torch.baddbmm(down_r[:, -1:], h, down_r[:, :-1])
    else:
        h = torch.bmm(h, down_r)  # [P, T, b]
    h = torch.bmm(ACTIVATIONS[act](h), up_l)  # [P, T, r2]
    if scale != 1.0:
        h = h * scale
    if layout.bias:
        h = F.pad(h, (0, 1), value=scale)  # a column for the bias row of up_r saves a pass over the result
    y = torch.bmm(h, up_r)
    return y + x if differentiated(y, x) else y.add_(x)


@_without_autocast
def tt_linear(x, L, R, bias):
    """`(x L) R + bias`, see ops.tt_linear."""
    if x.dtype == (wide := _dtype_of_products(x)):
        return _tt_linear(x, None, L, R, bias)
    return _in_blocks(_tt_linear, wide, x, None, R.shape[2], L, R, bias)


def _tt_linear(x, _, L, R, bias):
    h = torch.bmm(x, L.to(x.dtype))
    if bias is None:
        return torch.bmm(h, R.to(x.dtype))
    return torch.baddbmm(bias.to(x.dtype)[:, None], h, R.to(x.dtype))


@_without_autocast
def low_rank_linear(x, base, A, B, scale):
    """`base + scale * (x A) B`, see ops.low_rank_linear."""
    if x.dtype == (wide := _dtype_of_products(x)):
        return _low_rank_linear(x, base, A, B, scale)
    return _in_blocks(lambda *block: _low_rank_linear(*block, scale), wide, x, base, B.shape[2], A, B)


def _low_rank_linear(x, base, A, B, scale):
    h = torch.bmm(x, A.to(x.dtype))
    y = torch.bmm(h * scale if scale != 1.0 else h, B.to(x.dtype))
    return y + base if differentiated(y, base) else y.add_(base)


def _dtype_of_products(x):
    """float32 as in every backend, but float64 for float64, and where torch may round the operands of float32 products
    (torch.set_float32_matmul_precision): an oracle may not."""
    settings = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}.get(x.device.type)
    # torch.compile cannot trace the question.
    rounded = settings is not None and not torch.compiler.is_compiling() and settings.matmul.fp32_precision in _ROUNDED
    return torch.float64 if x.dtype == torch.float64 or rounded else torch.float32


def _in_blocks(fn, wide, x, base, d_out, *per_probe):
    """Run `fn(x, base, *per_probe)` in the dtype `wide` block by block, so that no copy of a whole activation exists.

    x `(P, T, d_in)` and base `(P, T, d_out)` or None are narrower; per_probe tensors have P first, or are None.
    """
    probes, tokens, d_in = x.shape
    if differentiated(x, base, *per_probe):
        return fn(x.to(wide), None if base is None else base.to(wide), *per_probe).to(x.dtype)
    y = x.new_empty((probes, tokens, d_out))
    widest = max(d_in, d_out, 1)
    token_step = max(1, min(tokens, _BLOCK // widest))
    probe_step = max(1, _BLOCK // (token_step * widest))
    for p in range(0, probes, probe_step):
        p_slice = slice(p, p + probe_step)
        rest = [None if f is None else f[p_slice] for f in per_probe]
        for t in range(0, tokens, token_step):
            block = (p_slice, slice(t, t + token_step))
            y[block] = fn(x[block].to(wide), None if base is None else base[block].to(wide), *rest)
    return y
