"""The CUDA kernels of csrc/: `native` calls these for tensors on a GPU. Arguments are validated, as in `native`.

Every launch goes to the current stream of the tensors' device and returns at once. Nothing here synchronises, and
calls can be captured in a CUDA graph; seeds and scales are then those of the capture.
"""

from __future__ import annotations

import torch

try:
    from adazeta_kernels import _native
except ImportError:  # backends/native.py tells the reason
    _native = None

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DISTRIBUTIONS = {"gaussian": 0, "rademacher": 1}


def unavailable() -> str | None:
    """None, or why no CUDA kernel can run: not built, no driver, no device."""
    try:
        count = _native.cuda_device_count()
    except RuntimeError as error:
        return str(error)
    return None if count else "the driver offers no CUDA device"


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
    """theta <- decay theta + sum_j scales[j] z(seeds[j]) in one launch.

    Raises:
        RuntimeError: more tensors or seeds than travel with a launch (112 and 64), while a CUDA graph is captured.
    """
    params = [p for p in params if p.numel()]
    if not params:
        return
    seeds, scales = seeds.contiguous(), scales.contiguous()
    lists = ([p.data_ptr() for p in params], [p.numel() for p in params], [DTYPES[p.dtype] for p in params])
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
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"perturb_: {len(lists[0])} tensors and {directions[-1]} seeds cannot be captured in a CUDA graph, at most "
            "112 tensors and 64 seeds can; split the list, or concatenate the tensors"
        )
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    _native.cuda_write_perturb_table(*lists, *directions, host.data_ptr())
    return host.to(device, non_blocking=True)


def perturb_rows(
    theta: torch.Tensor, seeds: torch.Tensor, scales: torch.Tensor, offset: int, distribution: str
) -> torch.Tensor:
    """Row p of the result `(P, n)` is theta + scales[p] z(seeds[p]); float32."""
    theta, seeds, scales = theta.contiguous(), seeds.contiguous(), scales.contiguous()
    out = theta.new_empty((seeds.numel(), theta.numel()))
    pointers = (theta.data_ptr(), out.data_ptr(), seeds.numel(), theta.numel(), seeds.data_ptr(), scales.data_ptr())
    _native.cuda_perturb_rows(*pointers, offset, DISTRIBUTIONS[distribution], _where(theta))
    return out
