"""The C++ kernels of csrc/ on the CPU. Takes validated arguments; here pointers are taken and threads are counted."""

from __future__ import annotations

import torch

try:
    from adazeta_kernels import _native
except ImportError as error:
    _native = None
    _IMPORT_ERROR = str(error)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_DISTRIBUTIONS = {"gaussian": 0, "rademacher": 1}
_OPS = ("fill_normal_", "perturb_", "perturb_rows")


def unavailable() -> str | None:
    """None, or why the extension module does not load."""
    if _native is None:
        return f"the extension module _native does not load ({_IMPORT_ERROR}); build it by `pip install -e .`"
    return None


def supports(op: str, *, device: str, dtype: torch.dtype) -> str | None:
    """None, or why the native kernels do not run `op` on such tensors."""
    if op not in _OPS:
        return f"no native kernel of {op} yet"
    if device != "cpu":
        return f"native kernels run on the CPU, not yet on {device}"
    if dtype not in _DTYPES or (op == "perturb_rows" and dtype != torch.float32):
        return f"no native kernel of {op} for {dtype}"
    return None


def levels() -> list[str]:
    """Instruction set levels that this CPU can run, best first: of "v4" (AVX-512), "v3" (AVX2 and FMA), "default"."""
    return _native.levels()


def fill_normal_(out: torch.Tensor, seed: int, offset: int, distribution: str, *, level: str = "auto") -> None:
    """out[i] <- z(seed)[offset + i]. `level` forces an instruction set level; the result is the same on all."""
    _native.fill_normal(
        out.data_ptr(),
        out.numel(),
        _DTYPES[out.dtype],
        seed,
        offset,
        _DISTRIBUTIONS[distribution],
        torch.get_num_threads(),
        level,
    )


def perturb_(
    params: list[torch.Tensor],
    seeds: torch.Tensor,
    scales: torch.Tensor,
    offset: int,
    decay: float,
    distribution: str,
    *,
    level: str = "auto",
) -> None:
    """theta <- decay theta + sum_j scales[j] z(seeds[j]), theta being the concatenation of `params`."""
    seeds, scales = seeds.contiguous(), scales.contiguous()
    _native.perturb(
        [p.data_ptr() for p in params],
        [p.numel() for p in params],
        [_DTYPES[p.dtype] for p in params],
        seeds.data_ptr(),
        scales.data_ptr(),
        seeds.numel(),
        offset,
        decay,
        _DISTRIBUTIONS[distribution],
        torch.get_num_threads(),
        level,
    )


def perturb_rows(
    theta: torch.Tensor,
    seeds: torch.Tensor,
    scales: torch.Tensor,
    offset: int,
    distribution: str,
    *,
    level: str = "auto",
) -> torch.Tensor:
    """Row p of the result `(P, n)` is theta + scales[p] z(seeds[p]), the bits that perturb_ would write; float32."""
    theta, seeds, scales = theta.contiguous(), seeds.contiguous(), scales.contiguous()
    out = theta.new_empty((seeds.numel(), theta.numel()))
    _native.perturb_rows(
        theta.data_ptr(),
        out.data_ptr(),
        seeds.numel(),
        theta.numel(),
        seeds.data_ptr(),
        scales.data_ptr(),
        offset,
        _DISTRIBUTIONS[distribution],
        torch.get_num_threads(),
        level,
    )
    return out
