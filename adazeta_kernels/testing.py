"""Helpers for testing ops: an independent dense oracle, tolerances, poisoned memory, statistics of directions.

Needs torch only, so that other packages can test their use of the ops with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from string import ascii_lowercase, ascii_uppercase

import torch
import torch.utils.deterministic

from adazeta_kernels.layout import TTAdapterLayout, TTShape

_ACTS = {
    "relu": lambda h: h.clamp(min=0),
    "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5)),
    "silu": lambda h: h / (1 + torch.exp(-h)),
    "tanh": torch.tanh,
    "identity": lambda h: h,
}


def dense_map(cores: list[torch.Tensor], shape: TTShape, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Multiply all cores `(r_left, n, r_right)` out in one einsum: the dense `W (d_in, d_out)`."""
    dims = ascii_lowercase[: len(cores)]
    terms = [ascii_uppercase[k] + dim + ascii_uppercase[k + 1] for k, dim in enumerate(dims)]
    dense = torch.einsum(f"{','.join(terms)}->{dims}", *(core.to(dtype) for core in cores))
    return dense.reshape(shape.d_in, shape.d_out)


def dense_adapter(
    x: torch.Tensor, theta: torch.Tensor, layout: TTAdapterLayout, act: str = "relu", scale: float = 1.0
) -> torch.Tensor:
    """Apply an adapter through its dense matrices in float64, sharing no code with the backends.

    Args:
        x: `(T, d)`, one probe.
        theta: `(n,)`, the numbers of this probe.

    Returns:
        `(T, d)`, float64: `x + scale * (act(x W_down + b_down) W_up + b_up)`.
    """
    parts = {s.name: theta[s.offset : s.offset + s.numel].reshape(s.shape).double() for s in layout.segments()}
    h = x.double()
    for name, shape in (("down", layout.down), ("up", layout.up)):
        h = h @ dense_map([parts[f"{name}.{k}"] for k in range(len(shape.core_shapes))], shape)
        h = h + parts.get(f"{name}.bias", 0.0)
        h = _ACTS[act](h) if name == "down" else h
    return x.double() + scale * h


def assert_as_exact_as(actual: torch.Tensor, plain: torch.Tensor, oracle: torch.Tensor, *, factor: float = 2.0) -> None:
    """Hold `actual` to the error of plain torch.

    `max|actual - oracle| <= factor * max|plain - oracle| + 4 eps max|oracle|`, eps of the accumulation dtype (float32,
    or float64 for float64 tensors), so that a plain result that is exact by luck does not fail its neighbour.

    Args:
        actual: result under test.
        plain: the same computation in plain torch at the same dtype.
        oracle: the same computation in float64.

    Raises:
        AssertionError: with both errors, also where a NaN or a different shape or dtype comes out.
    """
    if actual.shape != oracle.shape or actual.dtype != plain.dtype:
        raise AssertionError(
            f"got {actual.dtype} {tuple(actual.shape)}, expected {plain.dtype} {tuple(oracle.shape)} of the oracle"
        )
    if oracle.numel() == 0:
        return
    error, allowed = (float((t.double() - oracle).abs().max()) for t in (actual, plain))
    eps = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32).eps
    limit = factor * allowed + 4 * eps * float(oracle.abs().max())
    if not error <= limit:
        raise AssertionError(f"error {error:.3e} against float64, plain torch {allowed:.3e}, allowed {limit:.3e}")


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Make memory from torch.empty and its kin NaN (the largest number for integers), so that an element an op leaves
    unwritten is seen.

    It is torch's own mode for deterministic algorithms, which patches nothing and so is safe under torch.compile.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


def moment_deviations(z: torch.Tensor) -> list[float]:
    """Compare moments 1 to 8 of draws with those of the standard normal.

    Args:
        z: independent draws, any shape.

    Returns:
        `(mean(z^k) - m_k) / sqrt((m_2k - m_k^2) / N)` for k = 1..8, in standard errors: beyond 5 is no accident. The
        cut at 5.77 of the Gaussian directions shows in the 8th moment only from about 1e11 draws on.
    """
    z = z.detach().double().flatten()

    def moment(k):  # (k - 1)!! for even k
        return 0.0 if k % 2 else float(torch.arange(1, k, 2, dtype=torch.float64).prod())

    deviations, power = [], torch.ones_like(z)
    for k in range(1, 9):
        power = power * z
        error = ((moment(2 * k) - moment(k) ** 2) / z.numel()) ** 0.5
        deviations.append((float(power.mean()) - moment(k)) / error)
    return deviations
