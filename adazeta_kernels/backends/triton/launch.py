"""Launching Triton kernels: configurations that fit a device, and small tables on it.

    launch(kernel, programs, device, configuration, *arguments, **constexprs)

Nothing here makes the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from adazeta_kernels.backends.triton.compat import INTERPRETED

_WORDS = 8  # 64-bit words that one launch of write_words carries


@dataclass(frozen=True)
class Configuration:
    """Sizes that change the speed of a kernel and not its result.

    Attributes:
        sizes: `(name, value)` of constexpr arguments of the kernel.
        num_warps: warps of a program; 32 threads each, 64 on AMD.
        num_stages: depth of software pipelining.
    """

    sizes: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 1

    def __getitem__(self, name: str) -> int:
        return dict(self.sizes)[name]


@dataclass(frozen=True)
class Specimen:
    """One kernel as it may be launched, for ahead-of-time compilation in tests.

    Attributes:
        signature: parameter name -> type as Triton writes it ("i64", "fp32", "*bf16"); no constexprs.
        constexprs: name -> value.
        aligned: names of parameters that are multiples of 16.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    aligned: tuple[str, ...] = ()
    fp_fusion: bool = False


class Limits(NamedTuple):
    """What one program may use."""

    shared_bytes: int
    registers: int  # 32 bits each, per thread


# Shared memory of one block (CUDA C++ Programming Guide, compute capabilities), LDS of a workgroup (CDNA 3 ISA).
LIMITS = {
    ("cuda", 80): Limits(163 << 10, 255),
    ("cuda", 90): Limits(227 << 10, 255),
    ("cuda", 100): Limits(227 << 10, 255),
    ("hip", "gfx942"): Limits(64 << 10, 512),
}
SMALLEST = Limits(64 << 10, 255)


def limits(device: torch.device) -> Limits:
    """What a program may use on `device`; outside of the table what every GPU that Triton serves has."""
    if device.type != "cuda":
        return SMALLEST
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return LIMITS.get(("hip", name), SMALLEST)
    major, minor = torch.cuda.get_device_capability(device)
    return LIMITS.get(("cuda", 10 * major + minor), SMALLEST)


def configurations(
    candidates: Iterable[Configuration],
    need: Callable[[Configuration], Limits],
    limit: Limits = SMALLEST,
    *,
    most: int = 6,
) -> list[Configuration]:
    """The candidates that fit, in their order, `most` at most.

    Args:
        need: estimate of what a program uses under a configuration.

    Raises:
        ValueError: none fits.
    """
    fitting = [c for c in candidates if all(n <= m for n, m in zip(need(c), limit, strict=True))]
    if not fitting:
        raise ValueError(f"no configuration fits {limit}")
    return fitting[:most]


def shape_class(*sizes: int) -> tuple[int, ...]:
    """Sizes rounded up to powers of two: shapes of one class share a choice."""
    return tuple(triton.next_power_of_2(size) if size > 0 else 0 for size in sizes)


def launch(kernel, programs: int, device: torch.device, configuration: Configuration, *arguments, **constexprs) -> None:
    """Run `programs` programs of a kernel on the current stream of `device`."""
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    constexprs |= configuration.sizes
    if INTERPRETED:
        with np.errstate(all="ignore"):  # an overflow is silent on a GPU
            kernel[(programs,)](*arguments, **constexprs)
        return
    with torch.cuda.device(device):
        kernel[(programs,)](*arguments, **constexprs, **options, enable_fp_fusion=False)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured on the current stream of `device`."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@triton.jit(do_not_specialize=["address", "w0", "w1", "w2", "w3", "w4", "w5", "w6", "w7"])
def write_words(
    address: tl.int64,
    w0: tl.int64,
    w1: tl.int64,
    w2: tl.int64,
    w3: tl.int64,
    w4: tl.int64,
    w5: tl.int64,
    w6: tl.int64,
    w7: tl.int64,
):
    """Write eight numbers that travel as arguments of the launch."""
    to = address.to(tl.int64).to(tl.pointer_type(tl.int64))
    tl.store(to, w0)
    tl.store(to + 1, w1)
    tl.store(to + 2, w2)
    tl.store(to + 3, w3)
    tl.store(to + 4, w4)
    tl.store(to + 5, w5)
    tl.store(to + 6, w6)
    tl.store(to + 7, w7)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device` of a CPU tensor of a few numbers, without waiting for the device.

    While a CUDA graph is captured the numbers become arguments of launches, so that a replay reads no host memory; they
    are then those of the capture.
    """
    if device.type == "cpu":
        return tensor.contiguous()
    if capturing(device):
        return _through_launches(tensor, device)
    _load_write_words(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def _through_launches(tensor, device):
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    padded = torch.zeros(-(-max(raw.numel(), 1) // (8 * _WORDS)) * _WORDS, dtype=torch.int64, device="cpu")
    padded.view(torch.uint8)[: raw.numel()] = raw
    table = torch.empty(padded.numel(), dtype=torch.int64, device=device)
    words, single = padded.tolist(), Configuration((), num_warps=1)
    for begin in range(0, len(words), _WORDS):
        launch(write_words, 1, device, single, table.data_ptr() + 8 * begin, *words[begin : begin + _WORDS])
    return table.view(torch.uint8)[: raw.numel()].view(tensor.dtype).view(tensor.shape)


@cache
def _load_write_words(device):
    """Load the kernel now: while a graph is captured, the driver may refuse to load one."""
    _through_launches(torch.zeros(1, dtype=torch.int64, device="cpu"), device)


def specimens() -> list[Specimen]:
    signature = {"address": "i64"} | {f"w{k}": "i64" for k in range(_WORDS)}
    return [Specimen("write_words", write_words, signature, {}, num_warps=1)]
