"""Tiles: BLOCK consecutive elements of the index space, one per program, of a tensor known by its address.

Tiles begin at multiples of 8 of the element index, so a Gaussian block never straddles two, and a tile that lies within
its tensor and on a 16-byte boundary of memory is read and written 16 bytes at a time. Others go element by element.
"""

from __future__ import annotations

import triton.language as tl

from adazeta_kernels.backends.triton.compat import FLOAT32, helper, narrow, pointer, widen

ALIGNMENT = 8  # elements; what begins of tiles are multiples of

_ALIGNMENT = tl.constexpr(ALIGNMENT)


def tile_count(first_index: int, numel: int, block: int) -> int:
    """Tiles that cover `numel` elements from index `first_index` on."""
    return -(-(first_index % ALIGNMENT + numel) // block) if numel else 0


@helper
def tile_start(first_index, tile, BLOCK: tl.constexpr):
    """Index of the first element of a tile, and its position in the tensor, which is negative where index 0 of the
    tensor is no multiple of ALIGNMENT; int64."""
    base = (first_index.to(tl.int64) & -_ALIGNMENT) + tile.to(tl.int64) * BLOCK
    return base, base - first_index


@helper
def _whole(start, position, numel, BLOCK: tl.constexpr):
    return (position >= 0) & (position + BLOCK <= numel) & ((start & 15) == 0)


@helper
def load_tile(address, position, numel, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """float32 of elements position .. position + BLOCK - 1; 0 for those outside of the tensor."""
    start = address + position * (4 if DTYPE == FLOAT32 else 2)
    lanes = tl.arange(0, BLOCK)
    if _whole(start, position, numel, BLOCK):
        loaded = tl.load(tl.multiple_of(pointer(start, DTYPE) + lanes, 16))
    else:
        at = position + lanes
        loaded = tl.load(pointer(start, DTYPE) + lanes, mask=(at >= 0) & (at < numel), other=0.0)
    return widen(loaded)


@helper
def store_tile(address, position, numel, value, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Round `value`, float32, and write what lies within the tensor."""
    start = address + position * (4 if DTYPE == FLOAT32 else 2)
    lanes = tl.arange(0, BLOCK)
    value = narrow(value, DTYPE)
    if _whole(start, position, numel, BLOCK):
        tl.store(tl.multiple_of(pointer(start, DTYPE) + lanes, 16), value)
    else:
        at = position + lanes
        tl.store(pointer(start, DTYPE) + lanes, value, mask=(at >= 0) & (at < numel))
