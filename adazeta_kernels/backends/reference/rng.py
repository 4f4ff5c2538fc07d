"""The oracle of directions: docs/perturbation-spec.md written in numpy, without the extension.

float32 fused multiply-add is emulated in float64, so results do not depend on the processor's instructions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

_WORD = np.uint64(0xFFFFFFFF)
_CHUNK = 1 << 17  # elements; bounds the temporary arrays to about 20 MB

# float32 coefficients, highest power first, of
# -2 ln(1 - a) = a Q(a), sin(pi/2 x) = x S(x^2), cos(pi/2 x) = 1 + x^2 C(x^2).
LOG = [
    float.fromhex(c)
    for c in (
        "0x1.65c866p-3",
        "0x1.2504c6p-2",
        "0x1.31850ep-2",
        "0x1.535d2ap-2",
        "0x1.98d2c2p-2",
        "0x1.00049ap-1",
        "0x1.5556f4p-1",
        "0x1.fffffap-1",
        "0x1.0p+1",
    )
]
SIN = [float.fromhex(c) for c in ("-0x1.2d9302p-8", "0x1.465e92p-4", "-0x1.4abbbap-1", "0x1.921fb6p+0")]
COS = [float.fromhex(c) for c in ("0x1.d9f7bcp-11", "-0x1.55c664p-6", "0x1.03c1dep-2", "-0x1.3bd3ccp+0")]
TWO_LN_2 = float.fromhex("0x1.62e43p+0")
_SQRT_HALF_BITS = np.int32(0x3F3504F3)


def fma(a, b, c) -> np.ndarray:
    """a * b + c of float32 arrays, rounded once to float32.

    The product is exact in float64. The sum is rounded to odd there, which makes the second rounding innocuous
    (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    product = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32).astype(np.float64)
    c = np.asarray(c, np.float32).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.asarray(product + c)
        part = total - product
        error = (product - (total - part)) + (c - part)
        bits = total.view(np.int64)
        # An inexact even total becomes its odd neighbour on the side of the exact sum.
        inexact_even = ((error < 0) | (error > 0)) & (bits & 1 == 0)
        step = np.where((error < 0) == (total < 0), 1, -1)
        return (bits + np.where(inexact_even, step, 0)).view(np.float64).astype(np.float32)


def philox(seed: int, first_block: int, blocks: int, stream: int = 0) -> np.ndarray:
    """Words `(blocks, 4)` uint32 of consecutive Philox-4x32-10 blocks: counter (block low, block high, stream, 0)."""
    block = np.arange(blocks, dtype=np.uint64) + np.uint64(first_block)
    c0, c1 = block & _WORD, block >> np.uint64(32)
    c2, c3 = np.full_like(block, stream), np.zeros_like(block)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0), p1 & _WORD
        c2, c3 = (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1), p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def radius(w: np.ndarray) -> np.ndarray:
    """sqrt(-2 ln(((w >> 8) + 1) 2^-24)), float32."""
    k = ((w >> np.uint32(8)) + np.uint32(1)).astype(np.float32)  # exact: at most 24 bits
    bits = k.view(np.int32)
    e = (bits - _SQRT_HALF_BITS) >> np.int32(23)
    a = np.float32(1) - (bits - (e << np.int32(23))).view(np.float32)
    squared = fma((24 - e).astype(np.float32), TWO_LN_2, a * _horner(LOG, a))
    # Rounding a float64 square root to float32 gives the correctly rounded one: 53 >= 2 * 24 + 2 bits.
    return np.sqrt(squared.astype(np.float64)).astype(np.float32)


def cos_sin(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of (w >> 8) 2^-24 turns, float32."""
    n = (w >> np.uint32(8)).astype(np.int32)
    quarter = (n + (1 << 21)) >> 22
    x = (n - (quarter << 22)).astype(np.float32) * np.float32(2.0**-22)  # exact; in quarter turns
    y = x * x
    sine, cosine = _horner(SIN, y) * x, fma(_horner(COS, y), y, 1)
    quarter &= 3
    return (
        np.choose(quarter, [cosine, -sine, -cosine, sine]),
        np.choose(quarter, [sine, cosine, -sine, -cosine]),
    )


def gaussian(seed: int, first: int, count: int) -> np.ndarray:
    """Elements first .. first + count - 1 of a Gaussian direction, float32."""
    begin = first // 4
    words = philox(seed, begin, (first + count + 3) // 4 - begin)
    r = radius(words[:, 0::2])
    c, s = cos_sin(words[:, 1::2])
    return np.stack([r * c, r * s], axis=2).reshape(-1)[first - 4 * begin :][:count]


def rademacher(seed: int, first: int, count: int) -> np.ndarray:
    """Elements first .. first + count - 1 of a Rademacher direction, float32."""
    begin = first // 128
    words = philox(seed, begin, (first + count + 127) // 128 - begin)
    bits = (words[:, :, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    return (bits.reshape(-1)[first - 128 * begin :][:count].astype(np.float32) * 2 - 1).astype(np.float32)


_DIRECTIONS = {"gaussian": gaussian, "rademacher": rademacher}


def fill_normal_(out: torch.Tensor, seed: int, offset: int, distribution: str) -> None:
    """out[i] <- z(seed)[offset + i]."""
    direction = _DIRECTIONS[distribution]
    for piece, index in _chunks([out], offset):
        piece.copy_(torch.from_numpy(direction(seed, index, piece.numel())))


def perturb_(
    params: list[torch.Tensor],
    seeds: torch.Tensor,
    scales: torch.Tensor,
    offset: int,
    decay: float,
    distribution: str,
) -> None:
    """theta <- decay theta + sum_j scales[j] z(seeds[j]), theta being the concatenation of `params`."""
    terms = _terms(seeds, scales)
    for piece, index in _chunks(params, offset):
        piece.copy_(torch.from_numpy(_perturbed(_float32(piece), terms, index, decay, distribution)))


def perturb_rows(
    theta: torch.Tensor, seeds: torch.Tensor, scales: torch.Tensor, offset: int, distribution: str
) -> torch.Tensor:
    """Row p of the result `(P, n)` is theta + scales[p] z(seeds[p]): in float32 the bits that perturb_ would write, in
    float64 the oracle, the float32 normals scaled and added in float64."""
    out = theta.new_empty((seeds.numel(), theta.numel()))
    if theta.dtype == torch.float64:
        for row, seed in zip(out, seeds.tolist(), strict=True):
            fill_normal_(row, seed % 2**64, offset, distribution)
        return out.mul_(scales.to(out)[:, None]).add_(theta)
    for row, term in zip(out, _terms(seeds, scales), strict=True):
        for piece, index in _chunks([row], offset):
            source = _float32(theta[index - offset :][: piece.numel()])
            piece.copy_(torch.from_numpy(_perturbed(source, [term], index, 1.0, distribution)))
    return out


def _perturbed(acc, terms, index, decay, distribution):
    decay = np.float32(decay)
    if decay != 1:
        with np.errstate(over="ignore", invalid="ignore"):
            acc = acc * decay
    for seed, scale in terms:
        if scale != 0:  # adds nothing, not even the sign of a zero
            acc = fma(scale, _DIRECTIONS[distribution](seed, index, len(acc)), acc)
    return acc


def _terms(seeds, scales) -> list[tuple[int, np.float32]]:
    return [(seed % 2**64, np.float32(scale)) for seed, scale in zip(seeds.tolist(), scales.tolist(), strict=True)]


def _chunks(tensors, offset) -> Iterator[tuple[torch.Tensor, int]]:
    """Flat pieces of bounded size, with the index of their first element."""
    for tensor in tensors:
        flat = tensor.detach().view(-1)
        for begin in range(0, flat.numel(), _CHUNK):
            yield flat[begin : begin + _CHUNK], offset + begin
        offset += flat.numel()


def _float32(piece) -> np.ndarray:
    return piece.detach().to("cpu", torch.float32).numpy()


def _horner(coefficients, x):
    value = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        value = fma(value, x, c)
    return value
