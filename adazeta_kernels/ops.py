"""Every public op of adazeta_kernels: what it computes and takes. `registration.py` has their schemas and fakes.

Names of dimensions: P probes, T tokens per probe, d widths, r ranks, n numbers in theta, F factors per probe.
Seeds name directions: `z(seed)` is the vector that docs/perturbation-spec.md defines, the same bits on every backend.
Every op takes `backend`: "auto", "native", "triton" or "reference"; None asks the environment variable ADAZETA_BACKEND,
then "auto". An unknown name is a ValueError, a named backend that cannot run the call a RuntimeError with the reason.
Here types are checked and lists turned into tensors; all else is checked where the op runs, before anything is written.

`tt_factors`, `tt_adapter`, `tt_linear` and `low_rank_linear` are made for forward passes alone. Where grad mode is on
and an input requires grad, and in forward-mode differentiation (`torch.func.jvp`), they run the reference backend,
which is differentiable plain torch. torch.autocast changes no result, and torch.set_float32_matmul_precision makes none
less exact (but for derivatives within torch.compile).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adazeta_kernels import checks, dispatch
from adazeta_kernels.derivatives import differentiated
from adazeta_kernels.layout import TTAdapterLayout
from adazeta_kernels.registration import call


def fill_normal_(
    out: torch.Tensor,
    seed: int,
    *,
    offset: int = 0,
    distribution: str = "gaussian",
    backend: str | None = None,
) -> torch.Tensor:
    """Write a direction into a tensor, in place.

    `out[i] = z(seed)[offset + i]`, i counting elements in order of memory.

    Args:
        out: any shape, contiguous; float32, bfloat16 or float16.
        seed: names the direction, 0 <= seed < 2**64.
        offset: index of the first element, in elements.
        distribution: "gaussian" (|z| <= 5.77) or "rademacher" (-1 or 1).

    Returns:
        `out`.

    Raises:
        TypeError: `out` is not a floating tensor of a dtype above, `seed` or `offset` is no integer.
        ValueError: `out` is not contiguous, is a negated view, requires grad in grad mode or carries a tangent, `seed`
            or `offset` is out of range, an unknown distribution or backend.

    Numerics:
        float32 bits are the specification's on every backend; bfloat16 and float16 are those rounded once, to nearest
        even.

    Source: docs/perturbation-spec.md; Philox: Salmon et al. 2011; Box and Muller 1958.
    """
    checks.is_tensor("fill_normal_", "out", out)
    signed, offset = checks.seed("fill_normal_", seed), checks.offset("fill_normal_", offset)
    checks.are_names("fill_normal_", backend, distribution=distribution)
    checks.no_leaf_in_grad_mode("fill_normal_", (out,))
    call("fill_normal_", out, signed, offset, distribution, backend)
    return out


def perturb_(
    params: Sequence[torch.Tensor],
    seeds: Sequence[int] | torch.Tensor,
    scales: Sequence[float] | torch.Tensor,
    *,
    offset: int = 0,
    decay: float = 1.0,
    distribution: str = "gaussian",
    backend: str | None = None,
) -> None:
    """Add scaled directions to a list of tensors, in place and in one pass.

    `theta <- decay * theta + sum_j scales[j] z(seeds[j])`, theta being the concatenation of the list. It is the
    perturbation (one seed), the restore (the opposite scale), the move from one query to the next (two seeds), and the
    SGD update (all seeds, weight decay as `decay`). On a GPU it is one launch for any list; there up to 112 tensors and
    64 seeds can be captured in a CUDA graph, longer lists go through a table in device memory and cannot.

    Args:
        params: contiguous tensors on one device, none sharing memory with another; float32, bfloat16 or float16. Empty
            tensors are fine.
        seeds: J integers, 0 <= seed < 2**64, or an int64 tensor `(J,)` of the same bits, on the CPU. May be empty.
        scales: J numbers or a float32 tensor `(J,)` on the CPU.
        offset: index in the direction of the first element of the first tensor, in elements.
        decay: factor on theta; 1 leaves it exact.
        distribution: "gaussian" or "rademacher".

    Raises:
        TypeError: `params` is no list of tensors of a dtype above; seeds, scales, offset or decay of a wrong type.
        ValueError: an empty list; a tensor that is not contiguous, was freed, shares memory, is a negated view, lies on
            another device, requires grad in grad mode, or carries a tangent; as many seeds as scales are not given; a
            seed or offset out of range; a scale or decay that is not finite; an unknown distribution.

    Numerics:
        The sum is a chain of fused multiply-adds in float32, in the order of the list, rounded once to the dtype.
        Bit-identical on every backend. Restoring with the opposite scale is exact only to rounding (relative drift
        after 1000 cycles at scale 1e-3: float32 2e-6, float16 1.5e-2, bfloat16 .12); keep a copy where that matters.

    Source: MeZO (arXiv 2305.17333), algorithm 1; AdaZeta (arXiv 2406.18060), algorithm 1.
    """
    if isinstance(params, torch.Tensor) or not isinstance(params, Sequence):
        raise TypeError(f"perturb_: params must be a list of tensors, got {type(params).__name__}")
    if not params:
        raise ValueError("perturb_: params is an empty list, expected at least one tensor")
    params = list(params)
    if not torch.compiler.is_compiling():  # which C++ cannot follow
        params = checks.read(params)
    checks.are_tensors("perturb_", "params", params)
    seeds, scales = checks.seeds_to_tensor("perturb_", seeds), checks.scales_to_tensor("perturb_", scales)
    offset, decay = checks.offset("perturb_", offset), checks.finite("perturb_", "decay", decay)
    checks.are_names("perturb_", backend, distribution=distribution)
    checks.no_leaf_in_grad_mode("perturb_", params)
    call("perturb_", params, seeds, scales, offset, decay, distribution, backend)


def tt_factors(
    theta: torch.Tensor,
    layout: TTAdapterLayout,
    seeds: Sequence[int] | torch.Tensor,
    scales: Sequence[float] | torch.Tensor,
    *,
    offset: int = 0,
    adapters: int | None = None,
    distribution: str = "gaussian",
    backend: str | None = None,
) -> torch.Tensor:
    """Contract the TT cores of one adapter, or of several of one layout, at every probe; theta is not written.

    Probe p uses `theta_p = theta + scales[p] z(seeds[p])`. Of the cores `G_1 .. G_m | G_m+1 .. G_2m` of each map it
    gives `L = G_1 .. G_m` and `R = G_m+1 .. G_2m`. Many adapters are one launch on a GPU, and work for all threads on
    a CPU.

    Args:
        theta: `(n,)` with n = `layout.numel`, or `(A n,)`: A adapters one behind the other; float32, or float64 as an
            oracle.
        layout: where cores and biases lie in the theta of one adapter.
        seeds: P integers, 0 <= seed < 2**64, or an int64 tensor `(P,)` of the same bits, on the CPU.
        scales: P numbers or a float32 tensor `(P,)` on the CPU; 0 evaluates theta itself.
        offset: index in the direction of `theta[0]`, in elements; number i of adapter a has index `offset + a n + i`.
        adapters: A, at least 1; None is one adapter and a result without the first dimension.
        distribution: "gaussian" or "rademacher".

    Returns:
        `(P, F)` with F = `layout.factor_numel`, dtype of theta; `layout.split_factors` cuts it into L1, R1, b1, L2, R2
        and b2. With `adapters` `(A, P, F)`.

    Raises:
        TypeError: wrong dtype of theta, seeds or scales, `layout` is no TTAdapterLayout, `adapters` no integer.
        ValueError: theta of another length, `adapters` below 1, no seeds, as many seeds as scales are not given, a seed
            or offset out of range, a scale that is not finite, an unknown distribution.

    Numerics:
        theta_p has the bits that `perturb_` would write. Contraction in float32 without rounding in between; the result
        is never rounded below float32, since bfloat16 erases a perturbation of 1e-3. With float64 theta the float32
        normals are widened and all arithmetic is float64. The factors of an adapter have the same bits whether it is
        evaluated alone or with others.

    Source: AdaZeta (arXiv 2406.18060), section 3 and equation of the tensorized linear layer.
    """
    checks.is_tensor("tt_factors", "theta", theta)
    checks.is_layout("tt_factors", layout)
    seeds, scales = checks.seeds_to_tensor("tt_factors", seeds), checks.scales_to_tensor("tt_factors", scales)
    offset, adapters = checks.offset("tt_factors", offset), checks.adapters("tt_factors", adapters)
    checks.are_names("tt_factors", backend, distribution=distribution)
    if differentiated(theta):
        checks.tt_factors(theta, layout, seeds, scales, offset, adapters, distribution)
        run = dispatch.differentiable("tt_factors", backend)

        def rows(*args):
            return call("perturb_rows", *args, backend)

        factors = run(theta, layout, seeds, scales, offset, distribution, rows)
        return factors[0] if adapters is None else factors
    args = (theta, layout._encoded, seeds, scales, offset, adapters, distribution, backend)
    return call("tt_factors", *args)


def tt_adapter(
    x: torch.Tensor,
    factors: torch.Tensor,
    layout: TTAdapterLayout,
    *,
    act: str = "relu",
    scale: float = 1.0,
    overwrite: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Apply an adapter with its own factors at every probe.

    `y[p] = x[p] + scale * ((act((x[p] L1) R1 + b1) L2) R2 + b2)` with the factors of probe p.

    Args:
        x: `(P, T, d)`, probes first; float32, bfloat16, float16 or float64. T may be 0.
        factors: `(P, F)` from `tt_factors`; float32 (float64 too where x is).
        layout: the layout that made the factors.
        act: relu, gelu (exact, with erf), silu, tanh or identity.
        scale: factor on the adapter's output, without unit.
        overwrite: x is not needed any more, so the result may lie in its memory. The native kernels put it there on a
            CPU if x is contiguous, which saves a third of their memory traffic and the room of a result; ignored
            elsewhere, where derivatives are wanted, and under torch.compile.

    Returns:
        `(P, T, d)`, contiguous, dtype of x.

    Raises:
        TypeError: wrong dtype of x or factors, or `layout` is no TTAdapterLayout.
        ValueError: wrong shape or device, a scale that is not finite, an unknown act.

    Numerics:
        Products and activation in float32 (float64 for float64 x), the result rounded once to the dtype of x. Error
        against float64 at most twice that of the same computation in plain torch.

    Source: AdaZeta (arXiv 2406.18060), section 3; adapters: Houlsby et al. 2019 (arXiv 1902.00751).
    """
    checks.is_tensor("tt_adapter", "x", x)
    checks.is_tensor("tt_adapter", "factors", factors)
    checks.is_layout("tt_adapter", layout)
    checks.are_names("tt_adapter", backend, act=act)
    scale = checks.finite("tt_adapter", "scale", scale)
    if differentiated(x, factors):
        checks.tt_adapter(x, factors, layout, act, scale)
        return dispatch.differentiable("tt_adapter", backend)(x, factors, layout, act, scale)
    return call("tt_adapter", x, factors, layout._encoded, act, scale, backend, overwrite=overwrite)


def tt_linear(
    x: torch.Tensor,
    L: torch.Tensor,
    R: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Apply a contracted TT linear with its own factors at every probe.

    `y[p] = (x[p] L[p]) R[p] + bias[p]`.

    Args:
        x: `(P, T, d_in)`, probes first; float32, bfloat16, float16 or float64. T may be 0.
        L: `(P, d_in, r)`, float32 (float64 too where x is).
        R: `(P, r, d_out)`, dtype as L.
        bias: `(P, d_out)` or None, dtype as L.

    Returns:
        `(P, T, d_out)`, contiguous, dtype of x.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or device.

    Numerics:
        As `tt_adapter`.

    Source: AdaZeta (arXiv 2406.18060), section 3; Novikov et al. 2015 (arXiv 1509.06569).
    """
    for name, value in (("x", x), ("L", L), ("R", R)):
        checks.is_tensor("tt_linear", name, value)
    if bias is not None:
        checks.is_tensor("tt_linear", "bias", bias)
    checks.are_names("tt_linear", backend)
    if differentiated(x, L, R, bias):
        checks.tt_linear(x, L, R, bias)
        return dispatch.differentiable("tt_linear", backend)(x, L, R, bias)
    return call("tt_linear", x, L, R, bias, backend)


def low_rank_linear(
    x: torch.Tensor,
    base: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Add a low-rank map with its own factors at every probe to a frozen output.

    `y[p] = base[p] + scale * (x[p] A[p]) B[p]`: LoRA at several probes, or a low-rank direction of a frozen weight.

    Args:
        x: `(P, T, d_in)`, probes first; float32, bfloat16, float16 or float64. T may be 0.
        base: `(P, T, d_out)`, dtype of x: what the frozen layer gave for x. It is not written.
        A: `(P, d_in, r)`, float32 (float64 too where x is).
        B: `(P, r, d_out)`, dtype as A.
        scale: factor on the low-rank part, without unit.

    Returns:
        `(P, T, d_out)`, contiguous, dtype of x.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or device, or a scale that is not finite.

    Numerics:
        As `tt_adapter`; base is added before the one rounding.

    Source: LoRA (arXiv 2106.09685), section 4.1.
    """
    for name, value in (("x", x), ("base", base), ("A", A), ("B", B)):
        checks.is_tensor("low_rank_linear", name, value)
    checks.are_names("low_rank_linear", backend)
    scale = checks.finite("low_rank_linear", "scale", scale)
    if differentiated(x, base, A, B):
        checks.low_rank_linear(x, base, A, B)
        return dispatch.differentiable("low_rank_linear", backend)(x, base, A, B, scale)
    return call("low_rank_linear", x, base, A, B, scale, backend)
