"""Activations of float32 blocks: the formulas of csrc/include/adazeta/activation.h, without a library call.

So values do not depend on whose mathematical functions a GPU has. Errors and what becomes of infinities are
stated there.
"""

from __future__ import annotations

import triton.language as tl

from adazeta_kernels.backends.triton.compat import helper

ACTS = {"relu": 0, "gelu": 1, "silu": 2, "tanh": 3, "identity": 4}

_RELU, _GELU, _SILU, _TANH = (tl.constexpr(ACTS[name]) for name in ("relu", "gelu", "silu", "tanh"))
_SHIFT = tl.constexpr(float.fromhex("0x1.8p+23"))
_LOG2_E = tl.constexpr(float.fromhex("0x1.715476p+0"))
_LN2_HIGH = tl.constexpr(float.fromhex("0x1.62e4p-1"))
_LN2_LOW = tl.constexpr(float.fromhex("0x1.7f7d1cp-20"))
_E6, _E5, _E4, _E3, _E2 = (
    tl.constexpr(float.fromhex(c))
    for c in ("0x1.6a2438p-10", "0x1.1239ep-7", "0x1.5558f2p-5", "0x1.555492p-3", "0x1.fffffcp-2")
)
_P9, _P8, _P7, _P6, _P5, _P4, _P3, _P2, _P1, _P0 = (
    tl.constexpr(float.fromhex(c))
    for c in (
        "0x1.0dcbbap-26",
        "-0x1.0add88p-21",
        "0x1.bff7e2p-18",
        "-0x1.954b7ap-15",
        "0x1.797a2ep-13",
        "0x1.9ecebcp-16",
        "-0x1.3d4a3ep-8",
        "0x1.29e718p-5",
        "0x1.45f142p-2",
        "0x1.988464p-1",
    )
)


@helper
def _exponential(y):
    """`(power, rest)` with exp(y) = power (1 + rest), for y <= 0; below -87 the value at -87."""
    y = tl.where(y < -87.0, -87.0, y)
    # Adding 3 2^22 rounds to an integer and leaves it in the low bits, which then make 2^n.
    k = tl.fma(y, _LOG2_E, _SHIFT)
    n = k - _SHIFT
    f = tl.fma(n, -_LN2_HIGH, y)  # n times the first part of ln 2 is exact
    f = tl.fma(n, -_LN2_LOW, f)
    e = tl.fma(f, _E6, _E5)
    e = tl.fma(e, f, _E4)
    e = tl.fma(e, f, _E3)
    e = tl.fma(e, f, _E2)
    power = ((k.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
    return power, tl.fma(f * f, e, f)


@helper
def _unless_infinite(x, t, y):
    """y, the activation of x, but inf for inf, and NaN for -inf and NaN; t = |x|."""
    return tl.where(t < float("inf"), y, x + float("inf"))


@helper
def _gelu(x):
    """x Phi(x), exact form, by Phi(-t) = exp(-t P(t)) / 2."""
    t = tl.abs(x)
    p = tl.fma(t, _P9, _P8)
    p = tl.fma(p, t, _P7)
    p = tl.fma(p, t, _P6)
    p = tl.fma(p, t, _P5)
    p = tl.fma(p, t, _P4)
    p = tl.fma(p, t, _P3)
    p = tl.fma(p, t, _P2)
    p = tl.fma(p, t, _P1)
    p = tl.fma(p, t, _P0)
    power, rest = _exponential(-(p * t))
    half = 0.5 * power
    tail = x * tl.fma(half, rest, half)
    return _unless_infinite(x, t, tl.where(x < 0.0, tail, x - tail))


@helper
def _silu(x):
    """x / (1 + exp(-x))."""
    t = tl.abs(x)
    power, rest = _exponential(-t)
    e = tl.fma(power, rest, power)
    return _unless_infinite(x, t, tl.where(x < 0.0, x * e, x) / (1.0 + e))


@helper
def _tanh(x):
    """By m = exp(-2 |x|) - 1, which keeps its relative accuracy near 0."""
    power, rest = _exponential(-2.0 * tl.abs(x))
    m = tl.fma(power, rest, power - 1.0)
    size = m / (2.0 + m)
    return tl.where(x < 0.0, size, -size)


@helper
def activate(x, ACT: tl.constexpr):
    """The activation of number ACT in ACTS."""
    if ACT == _RELU:
        return tl.where(x < 0.0, 0.0, x)
    if ACT == _GELU:
        return _gelu(x)
    if ACT == _SILU:
        return _silu(x)
    if ACT == _TANH:
        return _tanh(x)
    return x
