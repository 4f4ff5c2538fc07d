"""Directions in Triton: docs/perturbation-spec.md, the same bits as csrc/include/adazeta/{philox,normal,rademacher}.h.

Kernels that call this must be launched with `enable_fp_fusion=False` (`launch.launch` does), else a product may be
fused with the sum it feeds. Seeds are two words, `split_seed` makes them; indices are int64 and not negative.
"""

from __future__ import annotations

import triton.language as tl

from adazeta_kernels.backends.reference import rng as spec
from adazeta_kernels.backends.triton.compat import RADEMACHER, fma, helper

_Q8, _Q7, _Q6, _Q5, _Q4, _Q3, _Q2, _Q1, _Q0 = (tl.constexpr(c) for c in spec.LOG)
_S3, _S2, _S1, _S0 = (tl.constexpr(c) for c in spec.SIN)
_C3, _C2, _C1, _C0 = (tl.constexpr(c) for c in spec.COS)
_TWO_LN_2 = tl.constexpr(spec.TWO_LN_2)
_TURN = tl.constexpr(2.0**-32)


@helper
def split_seed(seed):
    """Low and high word, uint32, of an int64 seed."""
    return seed.to(tl.uint32), (seed.to(tl.int64) >> 32).to(tl.uint32)


@helper
def philox(seed_lo, seed_hi, block):
    """The four words, uint32, of each block of the direction (section 1); `block` is an int64 tensor of any shape."""
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = seed_lo.to(tl.uint32)
    k1 = seed_hi.to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53  # one instruction gives both halves
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@helper
def radius(w):
    """sqrt(-2 ln(((w >> 8) + 1) 2^-24)) (section 3)."""
    bits = ((w >> 8) + 1).to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    a = 1.0 - (bits - (e << 23)).to(tl.float32, bitcast=True)
    q = fma(a, _Q8, _Q7)
    q = fma(q, a, _Q6)
    q = fma(q, a, _Q5)
    q = fma(q, a, _Q4)
    q = fma(q, a, _Q3)
    q = fma(q, a, _Q2)
    q = fma(q, a, _Q1)
    q = fma(q, a, _Q0)
    return tl.sqrt_rn(fma((24 - e).to(tl.float32), _TWO_LN_2, a * q))


@helper
def sine_cosine(v):
    """Sine and cosine of the angle (v >> 8) 2^-24 turns within its quarter, and the number of that quarter, 0 to 3."""
    quarter = (v + 0x20000000) >> 30
    x = ((v >> 8) << 10).to(tl.int32, bitcast=True).to(tl.float32) * _TURN  # quarter turns in [-1/2, 1/2), exact
    y = x * x
    s = fma(y, _S3, _S2)
    s = fma(s, y, _S1)
    s = fma(s, y, _S0)
    c = fma(y, _C3, _C2)
    c = fma(c, y, _C1)
    c = fma(c, y, _C0)
    return s * x, fma(c, y, 1.0), quarter


@helper
def _rotated(sine, cosine, quarter):
    """The cosine of an angle `quarter` quarter turns further; one quarter less gives its sine."""
    chosen = tl.where((quarter & 1) != 0, sine, cosine).to(tl.uint32, bitcast=True)
    return (chosen ^ (((quarter + 1) & 2) << 30)).to(tl.float32, bitcast=True)


@helper
def normal_pair(w, v):
    """The two elements that words w and v give."""
    r = radius(w)
    sine, cosine, quarter = sine_cosine(v)
    return r * _rotated(sine, cosine, quarter), r * _rotated(sine, cosine, quarter + 3)


@helper
def _sign(word, bit):
    """+1 for a set bit, -1 for a clear one (section 4)."""
    return (0xBF800000 ^ (((word >> bit) & 1) << 31)).to(tl.float32, bitcast=True)


@helper
def _word_of(w0, w1, w2, w3, k):
    """Word k, 0 to 3."""
    low = tl.where((k & 1) != 0, w1, w0)
    high = tl.where((k & 1) != 0, w3, w2)
    return tl.where((k & 2) != 0, high, low)


@helper
def direction(seed_lo, seed_hi, index, DISTRIBUTION: tl.constexpr):
    """float32 z of each element index, an int64 tensor of any shape: a whole block is made for each.

    Args:
        seed_lo, seed_hi: words of the seed, scalars or tensors that broadcast with `index`.
        index: element indices, int64, 0 to 2**63 - 1.
        DISTRIBUTION: compat.GAUSSIAN or compat.RADEMACHER.
    """
    if DISTRIBUTION == RADEMACHER:
        w0, w1, w2, w3 = philox(seed_lo, seed_hi, index >> 7)
        k = index.to(tl.uint32) & 127
        z = _sign(_word_of(w0, w1, w2, w3, k >> 5), k & 31)
    else:
        w0, w1, w2, w3 = philox(seed_lo, seed_hi, index >> 2)
        k = index.to(tl.uint32) & 3
        second = (k & 2) != 0
        sine, cosine, quarter = sine_cosine(tl.where(second, w3, w1))
        # The odd element of a pair is the sine: the cosine three quarters further.
        z = radius(tl.where(second, w2, w0)) * _rotated(sine, cosine, quarter + 3 * (k & 1))
    return z


@helper
def direction4(seed_lo, seed_hi, block, DISTRIBUTION: tl.constexpr):
    """float32 z of elements 4 block .. 4 block + 3, as four tensors of the shape of `block` (int64).

    One Philox block serves all four, of either distribution.
    """
    if DISTRIBUTION == RADEMACHER:
        w0, w1, w2, w3 = philox(seed_lo, seed_hi, block >> 5)
        k = block.to(tl.uint32) & 31
        bits = _word_of(w0, w1, w2, w3, k >> 3) >> ((k & 7) * 4)
        z0, z1, z2, z3 = _sign(bits, 0), _sign(bits, 1), _sign(bits, 2), _sign(bits, 3)
    else:
        w0, w1, w2, w3 = philox(seed_lo, seed_hi, block)
        z0, z1 = normal_pair(w0, w1)
        z2, z3 = normal_pair(w2, w3)
    return z0, z1, z2, z3


@helper
def direction_tile(seed_lo, seed_hi, base, DISTRIBUTION: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """float32 z of elements base .. base + BLOCK - 1, shape (BLOCK,); `base` is an int64 scalar, a multiple of GROUP.

    A thread makes GROUP consecutive elements, 4 or 8, which is how it loads and stores 16 bytes of float32 or of a
    16-bit dtype: no element has to move to another thread.
    """
    blocks = (base >> 2) + (tl.arange(0, BLOCK // GROUP) * (GROUP // 4)).to(tl.int64)
    a0, a1, a2, a3 = direction4(seed_lo, seed_hi, blocks, DISTRIBUTION)
    if GROUP == 4:
        z = tl.interleave(tl.interleave(a0, a2), tl.interleave(a1, a3))
    else:
        b0, b1, b2, b3 = direction4(seed_lo, seed_hi, blocks + 1, DISTRIBUTION)
        even = tl.interleave(tl.interleave(a0, b0), tl.interleave(a2, b2))
        odd = tl.interleave(tl.interleave(a1, b1), tl.interleave(a3, b3))
        z = tl.interleave(even, odd)
    return z
