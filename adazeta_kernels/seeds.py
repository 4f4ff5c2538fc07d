"""Seeds of directions, from the run seed: docs/perturbation-spec.md, section 7. Pure integers, no tensor."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import numpy as np

_WORD = 0xFFFFFFFF
_STREAM_SEEDS = 1
_FEW = 12  # from here on numpy is quicker than integers of Python


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10: four random 32-bit words for a counter of four words and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def derive_seed(run_seed: int, step: int, query: int) -> int:
    """Name the direction of one query of one step.

    `w0 + 2**32 w1` of Philox with key `run_seed` and counter `(step low, step high, query, 1)`.

    Args:
        run_seed: 0 <= run_seed < 2**64.
        step: 0 <= step < 2**64.
        query: 0 <= query < 2**32.

    Returns:
        A seed, 0 <= seed < 2**64.

    Raises:
        TypeError: an argument is no integer.
        ValueError: an argument is out of range.
    """
    run_seed, step, query = (
        _in_range("run_seed", run_seed, 64),
        _in_range("step", step, 64),
        _in_range("query", query, 32),
    )
    return _derive(run_seed, step, query)


def derive_seeds(run_seed: int, step: int, n: int) -> list[int]:
    """Name the directions of the first n queries of one step: `[derive_seed(run_seed, step, q) for q in range(n)]`.

    Raises:
        TypeError: an argument is no integer.
        ValueError: an argument is out of range, or n > 2**32.
    """
    run_seed, step = _in_range("run_seed", run_seed, 64), _in_range("step", step, 64)
    n = _in_range("n", n, 33)
    if n > 2**32:
        raise ValueError(f"derive_seeds: n must be at most 2**32, got {n}")
    if n < _FEW:
        return [_derive(run_seed, step, query) for query in range(n)]
    return _derive_many(run_seed, np.full(n, step, np.uint64), np.arange(n, dtype=np.uint64)).tolist()


def derive_seeds_of_steps(run_seed: int, steps: Sequence[int], counts: Sequence[int]) -> list[np.ndarray]:
    """Name the directions of many steps at once: for every step an array of `derive_seeds(run_seed, step, count)`.

    Args:
        run_seed: 0 <= run_seed < 2**64.
        steps: 0 <= step < 2**64 each.
        counts: queries of each step, 0 <= count <= 2**32.

    Returns:
        One uint64 array `(count,)` per step; the ops take its `.tolist()`.

    Raises:
        TypeError: an argument is no integer.
        ValueError: an argument is out of range, or there are not as many counts as steps.
    """
    run_seed = _in_range("run_seed", run_seed, 64)
    steps = np.array([_in_range("step", step, 64) for step in steps], np.uint64)
    counts = np.array([_in_range("count", count, 33) for count in counts], np.int64)
    if len(steps) != len(counts) or (counts > 2**32).any():
        raise ValueError(f"expected one count of at most 2**32 per step, got {len(steps)} steps, {len(counts)} counts")
    ends = counts.cumsum()
    queries = np.arange(counts.sum(), dtype=np.uint64) - np.repeat(ends - counts, counts).astype(np.uint64)
    return np.split(_derive_many(run_seed, np.repeat(steps, counts), queries), ends[:-1]) if len(steps) else []


def _derive(run_seed, step, query):
    w0, w1, _, _ = philox((step & _WORD, step >> 32, query, _STREAM_SEEDS), (run_seed & _WORD, run_seed >> 32))
    return w0 | w1 << 32


def _derive_many(run_seed: int, steps: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """`_derive` of uint64 arrays of the same length; products of two 32-bit words fit 64 bits."""
    word, half = np.uint64(_WORD), np.uint64(32)
    c0, c1, c2, c3 = steps & word, steps >> half, queries, np.full_like(steps, _STREAM_SEEDS)
    k0, k1 = run_seed & _WORD, run_seed >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ np.uint64(k0), p1 & word, (p0 >> half) ^ c3 ^ np.uint64(k1), p0 & word
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0 | c1 << half


def _in_range(name, value, bits):
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    value = index(value)
    if not 0 <= value < 2**bits:
        raise ValueError(f"{name} must be in 0 <= {name} < 2**{bits}, got {value}")
    return value
