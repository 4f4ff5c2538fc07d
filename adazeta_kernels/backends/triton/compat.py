"""Where Triton's interpreter, or one of its versions, computes something else than a GPU does: the only such place.

The interpreter (TRITON_INTERPRET=1, set before triton is imported) runs kernels in numpy on CPU tensors. Its faults, in
the versions 3.6 to 3.9:

- `tl.fma` is a product and a sum, rounded twice, before 3.9. Here it is rebuilt in float64 (`fma`).
- `range` over numbers of a kernel fails in 3.6 with numpy 2.4 and later, which convert no array of one number. There
  `span` takes the numbers out of their arrays.
- bfloat16 is held as its 16 bits, and arithmetic on it works on those; storing float32 as bfloat16 truncates. Kernels
  compute in float32, and `narrow` rounds by integer arithmetic.

On a GPU each function is the one instruction that it stands for.
"""

from __future__ import annotations

import triton
import triton.language as tl

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


@triton.jit
def _probe():
    pass


# What the decorator makes tells more than the environment variable, which may have been set too late.
INTERPRETED = not isinstance(_probe, triton.JITFunction)

_INTERPRETED = tl.constexpr(INTERPRETED)
_FMA_IS_EXACT = tl.constexpr(not INTERPRETED or VERSION >= (3, 9))

# Codes of dtypes and distributions in kernels, as in native_cuda.py.
FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)
GAUSSIAN = tl.constexpr(0)
RADEMACHER = tl.constexpr(1)


def _numbers(*bounds):
    return range(*(int(b.handle.data.item() if isinstance(b, tl.tensor) else tl.constexpr(b).value) for b in bounds))


# `for i in span(begin, end, step)` is a `range`, in kernels.
span = _numbers if INTERPRETED else tl.range


@triton.jit
def fma(a, b, c):
    """a * b + c of float32, rounded once."""
    if _FMA_IS_EXACT:
        result = tl.fma(a, b, c)
    else:
        # Exact product; its sum with c is rounded to odd, so that rounding to float32 gives what one rounding would
        # (Boldo and Melquiond, 2008).
        product = tl.cast(a, tl.float64) * tl.cast(b, tl.float64)
        addend = tl.cast(c, tl.float64)
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)
        bits = total.to(tl.int64, bitcast=True)
        inexact_even = (error != 0) & (error == error) & ((bits & 1) == 0)
        step = tl.where((error < 0) == (total < 0), 1, -1)
        odd = bits + tl.where(inexact_even, step, 0)
        result = odd.to(tl.float64, bitcast=True).to(tl.float32)
    return result


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 to the dtype of the code DTYPE, to nearest even."""
    if DTYPE == FLOAT32:
        result = x
    elif DTYPE == FLOAT16:
        result = x.to(tl.float16)
    elif _INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40  # rounding could carry a NaN into an infinity
        half = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded)
        result = half.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(tl.bfloat16)
    return result


@triton.jit
def pointer(address, DTYPE: tl.constexpr):
    """The int64 `address` as a pointer to elements of the dtype of the code DTYPE."""
    if DTYPE == FLOAT32:
        result = address.to(tl.pointer_type(tl.float32))
    elif DTYPE == BFLOAT16:
        result = address.to(tl.pointer_type(tl.bfloat16))
    else:
        result = address.to(tl.pointer_type(tl.float16))
    return result
