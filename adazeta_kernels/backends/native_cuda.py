"""The CUDA kernels of csrc/: `native` calls these for tensors on a GPU. Arguments are validated, as in `native`.

Every launch goes to the current stream of the tensors' device and returns at once. Nothing here synchronises, and
calls can be captured in a CUDA graph; seeds and scales are then those of the capture.
"""

from __future__ import annotations

import torch

from adazeta_kernels.layout import TTAdapterLayout

try:
    from adazeta_kernels import _native
except ImportError:  # backends/native.py tells the reason
    _native = None

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DISTRIBUTIONS = {"gaussian": 0, "rademacher": 1}
ACTS = {"relu": 0, "gelu": 1, "silu": 2, "tanh": 3, "identity": 4}


def unavailable() -> str | None:
    """None, or why no CUDA kernel can run: not built, no driver, no device."""
    try:
        count = _native.cuda_device_count()
    except RuntimeError as error:
        return str(error)
    return None if count else "the driver offers no CUDA device"


def too_old(index: int | None) -> str | None:
    """None, or why the kernels do not run on the device of that index, or on the current one."""
    major, minor = torch.cuda.get_device_capability(index)
    lowest = _native.cuda_lowest_capability()
    if 10 * major + minor < lowest:
        built = f"{lowest // 10}.{lowest % 10}"
        return f"the device has compute capability {major}.{minor}, the kernels are built for {built} and above"
    return None


def _where(tensor: torch.Tensor) -> tuple[int, int]:
    """Index of the device and address of its current stream."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def fill_normal_(out: torch.Tensor, seed: int, offset: int, distribution: str) -> None:
    """out[i] <- z(seed)[offset + i]."""
    code = DTYPES[out.dtype]
    _native.cuda_fill_normal(out.data_ptr(), out.numel(), code, seed, offset, DISTRIBUTIONS[distribution], _where(out))


def perturb_(
    params: list[torch.Tensor],
    seeds: torch.Tensor,
    scales: torch.Tensor,
    offset: int,
    decay: float,
    distribution: str,
) -> None:
    """theta <- decay theta + sum_j scales[j] z(seeds[j]) in one launch, however many tensors and seeds there are.

    Up to 112 tensors and 64 seeds travel with the launch. Longer lists go ahead of it on the same stream, as a table in
    device memory of torch's allocator: one copy from pinned memory, which does not wait.

    Raises:
        RuntimeError: lists that need a table, while a CUDA graph is captured (the graph would replay a copy from memory
            that is gone).
    """
    params = [p for p in params if p.numel()]
    if not params:
        return
    seeds, scales = seeds.contiguous(), scales.contiguous()
    lists = tensor_lists(params)
    directions = (seeds.data_ptr(), scales.data_ptr(), seeds.numel())
    table = _device_table(params[0].device, lists, directions)
    address = 0 if table is None else table.data_ptr()
    code = DISTRIBUTIONS[distribution]
    _native.cuda_perturb(*lists, *directions, offset, decay, code, address, _where(params[0]))


def _device_table(device, lists, directions):
    """Lists too long for a launch, on the device; None where they are not. torch frees it in stream order."""
    size = _native.cuda_perturb_table_bytes(len(lists[0]), directions[-1])
    if not size:
        return None
    if _capturing(device):
        raise RuntimeError(
            f"perturb_: {len(lists[0])} tensors and {directions[-1]} seeds cannot be captured in a CUDA graph, at most "
            "112 tensors and 64 seeds can; split the list, or concatenate the tensors"
        )
    host = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    _native.cuda_write_perturb_table(*lists, *directions, host.data_ptr())
    return host.to(device, non_blocking=True)


def _capturing(device):
    """Whether a CUDA graph is captured on the current stream of the device, which need not be the current device."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def perturb_rows(
    theta: torch.Tensor, seeds: torch.Tensor, scales: torch.Tensor, offset: int, distribution: str
) -> torch.Tensor:
    """Row p of the result `(P, n)` is theta + scales[p] z(seeds[p]); float32."""
    theta, seeds, scales = theta.contiguous(), seeds.contiguous(), scales.contiguous()
    out = theta.new_empty((seeds.numel(), theta.numel()))
    pointers = (theta.data_ptr(), out.data_ptr(), seeds.numel(), theta.numel(), seeds.data_ptr(), scales.data_ptr())
    _native.cuda_perturb_rows(*pointers, offset, DISTRIBUTIONS[distribution], _where(theta))
    return out


def tt_factors(
    theta: torch.Tensor,
    layout: TTAdapterLayout,
    seeds: torch.Tensor,
    scales: torch.Tensor,
    offset: int,
    distribution: str,
) -> torch.Tensor:
    """Factors `(A, P, F)` of theta + scales[p] z(seeds[p]), theta holding A adapters; see ops.tt_factors."""
    theta, seeds, scales = theta.contiguous(), seeds.contiguous(), scales.contiguous()
    adapters, where = theta.numel() // layout.numel, _where(theta)
    out = theta.new_empty((adapters, seeds.numel(), layout.factor_numel))
    floats = _native.cuda_tt_factors_scratch(layout._encoded, where)
    scratch = theta.new_empty(adapters * seeds.numel() * floats) if floats else None
    _native.cuda_tt_factors(
        theta.data_ptr(),
        out.data_ptr(),
        layout._encoded,
        adapters,
        seeds.data_ptr(),
        scales.data_ptr(),
        seeds.numel(),
        offset,
        DISTRIBUTIONS[distribution],
        0 if scratch is None else scratch.data_ptr(),
        where,
    )
    return out


def tt_adapter(x: torch.Tensor, factors: torch.Tensor, layout: TTAdapterLayout, act: str, scale: float) -> torch.Tensor:
    """`x + scale * up(act(down(x)))`; see ops.tt_adapter."""
    x, factors = x.contiguous(), dense_rows(factors)
    y, where = torch.empty_like(x), _where(x)
    probes, tokens, _ = x.shape
    # Few tokens are split over d: the parts of x L1 go through memory.
    floats = _native.cuda_tt_adapter_scratch(probes, tokens, layout._encoded, where)
    scratch = factors.new_empty(floats) if floats else None
    _native.cuda_tt_adapter(
        x.data_ptr(),
        y.data_ptr(),
        DTYPES[x.dtype],
        probes,
        tokens,
        layout._encoded,
        factors.data_ptr(),
        factors.stride(0),
        ACTS[act],
        scale,
        0 if scratch is None else scratch.data_ptr(),
        where,
    )
    return y


def tt_adapter_from_cores(
    x: torch.Tensor,
    theta: torch.Tensor,
    layout: TTAdapterLayout,
    seeds: torch.Tensor,
    scales: torch.Tensor,
    offset: int,
    distribution: str,
    act: str,
    scale: float,
) -> torch.Tensor:
    """`tt_adapter(x, tt_factors(theta, ..), ..)` in one launch, with no factor in memory. No op calls it yet: it is
    here to be measured against the two (benchmarks/bench_cuda.py).

    Raises:
        RuntimeError: the last input core of the map down, or what is behind the first output core of the map up, is no
            multiple of 8 wide (4096 -> 64 is fine, 576 -> 64 is not), or the cores do not fit in a block's shared
            memory.
    """
    x, theta, seeds, scales = x.contiguous(), theta.contiguous(), seeds.contiguous(), scales.contiguous()
    y = torch.empty_like(x)
    tokens = (x.data_ptr(), y.data_ptr(), DTYPES[x.dtype], x.shape[0], x.shape[1], layout._encoded)
    cores = (theta.data_ptr(), seeds.data_ptr(), scales.data_ptr(), offset, DISTRIBUTIONS[distribution])
    _native.cuda_tt_adapter_from_cores(*tokens, *cores, ACTS[act], scale, _where(x))
    return y


def tt_linear(x: torch.Tensor, L: torch.Tensor, R: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`(x L) R + bias`; see ops.tt_linear."""
    return _low_rank(x, None, L, R, bias, 1.0)


def low_rank_linear(
    x: torch.Tensor, base: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float
) -> torch.Tensor:
    """`base + scale * (x A) B`; see ops.low_rank_linear."""
    return _low_rank(x, base.contiguous(), A, B, None, scale)


def _low_rank(x, base, left, right, bias, scale):
    x, left, right = x.contiguous(), dense_rows(left), dense_rows(right)
    bias = None if bias is None else dense_rows(bias)
    probes, tokens, d_in = x.shape
    rank, d_out = right.shape[1:]
    y = x.new_empty((probes, tokens, d_out))
    data = (x.data_ptr(), 0 if base is None else base.data_ptr(), y.data_ptr(), DTYPES[x.dtype])
    factors = (left.data_ptr(), left.stride(0), right.data_ptr(), right.stride(0))
    bias_ = (0, 0) if bias is None else (bias.data_ptr(), bias.stride(0))
    _native.cuda_low_rank(*data, probes, tokens, d_in, d_out, rank, *factors, *bias_, scale, _where(x))
    return y


def tensor_lists(params: list[torch.Tensor]) -> tuple[list[int], list[int], list[int]]:
    """Addresses, lengths and dtype codes of tensors, as the module takes lists."""
    return [p.data_ptr() for p in params], [p.numel() for p in params], [DTYPES[p.dtype] for p in params]


def dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied unless each of its rows (dimension 0) is dense; the distance between rows may be anything."""
    dense = tensor.shape[0] > 0 and tensor[0].is_contiguous()
    return tensor if dense else tensor.contiguous()
