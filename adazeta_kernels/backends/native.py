"""The C++ and CUDA kernels of csrc/. Takes validated arguments; here pointers are taken and threads are counted.

Tensors on a GPU go to native_cuda.py. `level` forces an instruction set level of the CPU; results are the same on all
of the first three ops.
"""

from __future__ import annotations

import torch

from adazeta_kernels.backends import native_cuda
from adazeta_kernels.backends.native_cuda import ACTS as _ACTS
from adazeta_kernels.backends.native_cuda import DISTRIBUTIONS as _DISTRIBUTIONS
from adazeta_kernels.backends.native_cuda import DTYPES as _DTYPES
from adazeta_kernels.backends.native_cuda import dense_rows as _dense_rows
from adazeta_kernels.backends.native_cuda import tensor_lists as _tensor_lists
from adazeta_kernels.dispatch import ReadTensors
from adazeta_kernels.layout import TTAdapterLayout

try:
    from adazeta_kernels import _native
except ImportError as error:
    _native = None
    _IMPORT_ERROR = str(error)

# How C++ reads tensors by itself; absent in old versions of torch. Subclasses may not hold what they show.
_EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
_CLASSES = (torch.Tensor, torch.nn.Parameter)

_FLOAT32_ONLY = ("perturb_rows", "tt_factors")


def unavailable() -> str | None:
    """None, or why the extension module does not load."""
    if _native is None:
        return f"the extension module _native does not load ({_IMPORT_ERROR}); build it by `pip install -e .`"
    return None


def supports(
    op: str,
    *,
    device: str,
    dtype: torch.dtype,
    index: int | None = None,
    cores: int = 0,
    rank: int = 1,
    bottleneck: int = 0,
    **sizes: int,
) -> str | None:
    """None, or why the native kernels do not run `op` on such tensors.

    Args:
        index: which of the devices; None is the current one.
        cores: the most cores of a map.
        rank: the largest bond between L and R.
        bottleneck: width between the two maps.
    """
    if device == "cuda":
        if reason := native_cuda.unavailable() or native_cuda.too_old(index):
            return f"CUDA: {reason}"
    elif device != "cpu":
        return f"native kernels run on the CPU and on CUDA, not on {device}"
    if dtype not in _DTYPES or (op in _FLOAT32_ONLY and dtype != torch.float32):
        return f"no native kernel of {op} for {dtype}"
    limits = (
        ("cores of a map", cores, _native.MAX_CORES),
        ("rank", rank, _native.MAX_RANK),
        ("bottleneck", bottleneck, _native.MAX_BOTTLENECK),
    )
    for what, value, limit in limits:
        if value > limit:
            return f"{what} {value} is above the native kernel's limit of {limit}"
    return "a map of rank 0 has no native kernel" if rank == 0 else None


def read_tensors(params: list[torch.Tensor]) -> ReadTensors:
    """The tensors, and how C++ holds them if they are plain. Where one is not, or C++ cannot tell, Python looks."""
    if _native is None or _EXCHANGE is None:
        return ReadTensors(params, None)
    read = _native.read_tensors(params, _CLASSES, _EXCHANGE)
    if read and (any(map(_freed_or_negated, map(params.__getitem__, read.doubtful))) or read.overlap()):
        read = None
    return ReadTensors(params, read)


def _freed_or_negated(tensor):
    return tensor.is_neg() or not tensor.untyped_storage().nbytes()


def levels() -> list[str]:
    """Instruction set levels that this CPU can run, best first: of "v4_bf16" (AVX-512 with BF16, for ops on tokens;
    else as "v4"), "v4" (AVX-512), "v3" (AVX2 and FMA), "default"."""
    return _native.levels()


def fill_normal_(out: torch.Tensor, seed: int, offset: int, distribution: str, *, level: str = "auto") -> None:
    """out[i] <- z(seed)[offset + i]. `level` forces an instruction set level; the result is the same on all."""
    if out.is_cuda:
        return native_cuda.fill_normal_(out, seed, offset, distribution)
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
    if params[0].is_cuda:
        return native_cuda.perturb_(params, seeds, scales, offset, decay, distribution)
    seeds, scales = seeds.contiguous(), scales.contiguous()
    _native.perturb(
        getattr(params, "native", None) or _native.TensorList(*_tensor_lists(params)),
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
    if theta.is_cuda:
        return native_cuda.perturb_rows(theta, seeds, scales, offset, distribution)
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


def tt_factors(
    theta: torch.Tensor,
    layout: TTAdapterLayout,
    seeds: torch.Tensor,
    scales: torch.Tensor,
    offset: int,
    distribution: str,
    *,
    level: str = "auto",
) -> torch.Tensor:
    """Factors `(A, P, F)` of theta + scales[p] z(seeds[p]), theta holding A adapters; see ops.tt_factors."""
    if theta.is_cuda:
        return native_cuda.tt_factors(theta, layout, seeds, scales, offset, distribution)
    theta, seeds, scales = theta.contiguous(), seeds.contiguous(), scales.contiguous()
    adapters = theta.numel() // layout.numel
    out = theta.new_empty((adapters, seeds.numel(), layout.factor_numel))
    _native.tt_factors(
        theta.data_ptr(),
        out.data_ptr(),
        layout._encoded,
        adapters,
        seeds.data_ptr(),
        scales.data_ptr(),
        seeds.numel(),
        offset,
        _DISTRIBUTIONS[distribution],
        torch.get_num_threads(),
        level,
    )
    return out


def tt_adapter(
    x: torch.Tensor,
    factors: torch.Tensor,
    layout: TTAdapterLayout,
    act: str,
    scale: float,
    overwrite: bool = False,
    *,
    level: str = "auto",
) -> torch.Tensor:
    """`x + scale * up(act(down(x)))`; see ops.tt_adapter. On a GPU x is never overwritten."""
    if x.is_cuda:
        return native_cuda.tt_adapter(x, factors, layout, act, scale)
    x, factors = x.contiguous(), _dense_rows(factors)
    y = x if overwrite else torch.empty_like(x)
    _native.tt_adapter(
        x.data_ptr(),
        y.data_ptr(),
        _DTYPES[x.dtype],
        x.shape[0],
        x.shape[1],
        layout._encoded,
        factors.data_ptr(),
        factors.stride(0),
        _ACTS[act],
        scale,
        torch.get_num_threads(),
        level,
    )
    return y


def tt_linear(
    x: torch.Tensor, L: torch.Tensor, R: torch.Tensor, bias: torch.Tensor | None, *, level: str = "auto"
) -> torch.Tensor:
    """`(x L) R + bias`; see ops.tt_linear."""
    if x.is_cuda:
        return native_cuda.tt_linear(x, L, R, bias)
    return _low_rank(_native.tt_linear, x, None, L, R, bias, 1.0, level)


def low_rank_linear(
    x: torch.Tensor, base: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, *, level: str = "auto"
) -> torch.Tensor:
    """`base + scale * (x A) B`; see ops.low_rank_linear."""
    if x.is_cuda:
        return native_cuda.low_rank_linear(x, base, A, B, scale)
    return _low_rank(_native.low_rank_linear, x, base.contiguous(), A, B, None, scale, level)


def _low_rank(kernel, x, base, left, right, bias, scale, level):
    x, left, right = x.contiguous(), _dense_rows(left), _dense_rows(right)
    if bias is not None:
        bias = _dense_rows(bias)
    probes, tokens, d_in = x.shape
    rank, d_out = right.shape[1:]
    y = x.new_empty((probes, tokens, d_out))
    kernel(
        x.data_ptr(),
        0 if base is None else base.data_ptr(),
        y.data_ptr(),
        _DTYPES[x.dtype],
        probes,
        tokens,
        d_in,
        d_out,
        rank,
        left.data_ptr(),
        left.stride(0),
        right.data_ptr(),
        right.stride(0),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else bias.stride(0),
        scale,
        torch.get_num_threads(),
        level,
    )
    return y
