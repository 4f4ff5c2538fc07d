"""What fill_normal_, perturb_ and perturb_rows share: codes, configurations, and the list of kernels to compile."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch
import triton

from adazeta_kernels.backends.triton import compat, launch
from adazeta_kernels.backends.triton.launch import Configuration, Limits

DTYPES = {
    torch.float32: compat.FLOAT32.value,
    torch.bfloat16: compat.BFLOAT16.value,
    torch.float16: compat.FLOAT16.value,
}
DISTRIBUTIONS = {"gaussian": compat.GAUSSIAN.value, "rademacher": compat.RADEMACHER.value}

# Elements of a tile and warps: 8 elements a thread, 16 for more loads in flight, more threads for fewer programs.
_SHAPES = ((1024, 4), (2048, 4), (4096, 8))
_MEASURED = 1 << 24  # elements beyond which a larger call is no other case


def group(dtype: int) -> int:
    """Consecutive elements of a thread: 16 bytes of the dtype; 4 where dtypes are mixed."""
    return 8 if dtype in (compat.BFLOAT16.value, compat.FLOAT16.value) else 4


def candidates(dtype: int, device: torch.device, numel: int) -> list[Configuration]:
    """Configurations for tensors of `numel` elements in all.

    In the interpreter every operation costs the same for any length, so a tile is as large as the tensors are.
    """
    if compat.INTERPRETED:
        block = min(max(triton.next_power_of_2(numel), 1 << 8), 1 << 18)
        return [Configuration((("BLOCK", block), ("GROUP", group(dtype))))]
    return _fitting(dtype, launch.limits(device))


def _fitting(dtype, limits):
    shapes = (Configuration((("BLOCK", block), ("GROUP", group(dtype))), warps) for block, warps in _SHAPES)
    return launch.configurations(shapes, _need, limits)


def _need(configuration: Configuration) -> Limits:
    """Running sum, direction, words and angles of every element of a thread; a tile that changes threads."""
    elements = configuration["BLOCK"] // (32 * configuration.num_warps)
    return Limits(shared_bytes=4 * configuration["BLOCK"], registers=40 + 6 * elements)


def measured_numel(numel: int) -> int:
    """Elements on which configurations for `numel` elements are measured."""
    return min(*launch.shape_class(numel), _MEASURED)


def specimens(name: str, kernel, signature: dict[str, str], dtypes: Iterable[int]) -> list[launch.Specimen]:
    """A kernel for every dtype, distribution and configuration that `candidates` can give on any GPU."""
    found = []
    for dtype, (distribution, code) in product(dtypes, DISTRIBUTIONS.items()):
        for configuration in _fitting(dtype, launch.SMALLEST):
            sizes = dict(configuration.sizes)
            label = f"{name} dtype={dtype} {distribution} {sizes['BLOCK']}/{configuration.num_warps}"
            constexprs = {"DTYPE": dtype, "DISTRIBUTION": code, **sizes}
            found.append(launch.Specimen(label, kernel, signature, constexprs, configuration.num_warps))
    return found
