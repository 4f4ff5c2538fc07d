"""A width as a product of two or three numbers that are as equal as its divisors allow."""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

_LARGEST = 2**30  # beyond it the search for factors would take seconds, then days
# A core whose dimension dwarfs the others saves nothing; up to this size it still does at any width in use.
_HARMLESS_FACTOR = 64


def balanced_factors(size: int, name: str = "width") -> tuple[int, ...]:
    """Split `size` into the three factors with the smallest sum, in ascending order; two where it has only two primes.

    4096 -> (16, 16, 16), 768 -> (8, 8, 12), 11008 -> (16, 16, 43), 77 -> (7, 11).

    Args:
        size: the width to split.
        name: what the error calls it, "width" or "bottleneck".

    Raises:
        TypeError: `size` is not an integer.
        ValueError: `size` is below 4, above 2**30, prime, or so nearly prime that one factor keeps most of it.
    """
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name} must be an integer, got {size!r} of type {type(size).__name__}")
    if size < 4:
        raise ValueError(f"{name} {size} is too small for a TT shape, expected at least 4")
    if size > _LARGEST:
        raise ValueError(f"{name} {size} is too large for a TT shape, expected at most {_LARGEST}")
    best = _best_factors(size)
    if _is_balanced(size, best):
        return best
    what = "is prime" if len(best) == 1 else f"is nearly prime (largest factor {best[-1]})"
    if name == "bottleneck":
        below, above = _nearest_balanced(size)
        advice = f"use a bottleneck of {below} or {above}"
    else:
        advice = (
            f"no TT shape shrinks it; keep that dimension in one core with shapes={{{name!r}: {best}}}, or adapt "
            "modules of another width"
        )
    raise ValueError(f"{name} {size} {what}: {advice}")


@lru_cache(maxsize=1024)
def _best_factors(size: int) -> tuple[int, ...]:
    divisors = [k for k in range(2, isqrt(size) + 1) if size % k == 0]
    triples = [
        (a, b, size // (a * b)) for a in divisors for b in divisors if a <= b <= size // (a * b) and size % (a * b) == 0
    ]
    return min(triples or [(a, size // a) for a in divisors], key=sum, default=(size,))


def _is_balanced(size: int, factors: tuple[int, ...]) -> bool:
    return len(factors) > 1 and factors[-1] <= max(_HARMLESS_FACTOR, 2 * isqrt(size))


def _nearest_balanced(size: int) -> tuple[int, int]:
    below = (k for k in range(size - 1, 3, -1) if _is_balanced(k, _best_factors(k)))
    above = (k for k in range(size + 1, 2 * size) if _is_balanced(k, _best_factors(k)))
    return next(below, 4), next(above, 2 * size)
