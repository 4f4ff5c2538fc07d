"""Where Triton's interpreter, or one of its versions, computes something else than a GPU does: the only such place.

The interpreter (TRITON_INTERPRET=1, set before triton is imported) runs kernels in numpy on CPU tensors. Its faults, in
the versions 3.6 to 3.9:

- `tl.fma` is a product and a sum, rounded twice, before 3.9. `fma` takes the oracle's, which is exact.
- `range` over numbers of a kernel fails in 3.6 with numpy 2.4 and later, which convert no array of one number. There
  `span` takes the numbers out of their arrays.
- bfloat16 is held as its 16 bits, and arithmetic on it works on those. Conversion from float32 truncates, and that to
  float32 makes subnormal numbers zero. Kernels compute in float32, `narrow` and `widen` convert by integer arithmetic.

On a GPU each function is the one instruction that it stands for.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from adazeta_kernels.backends.reference.rng import fma as exact_fma

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


@triton.jit
def _probe():
    pass


# What the decorator makes tells more than the environment variable, which may have been set too late.
INTERPRETED = not isinstance(_probe, triton.JITFunction)

# `@helper` marks a function that kernels call. The interpreter needs milliseconds to enter what `triton.jit` made, so
# there it stays a plain function, which runs as part of the kernel.
helper = (lambda function: function) if INTERPRETED else triton.jit

_INTERPRETED = tl.constexpr(INTERPRETED)

# Codes of dtypes and distributions in kernels, as in native_cuda.py.
FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)
GAUSSIAN = tl.constexpr(0)
RADEMACHER = tl.constexpr(1)


def _numbers(*bounds, num_stages=None):
    return range(*(int(b.handle.data.item() if isinstance(b, tl.tensor) else tl.constexpr(b).value) for b in bounds))


# `for i in span(begin, end, step)` is a `tl.range`, in kernels.
span = _numbers if INTERPRETED else tl.range


def _number(value):
    return value.handle.data if isinstance(value, tl.tensor) else np.float32(tl.constexpr(value).value)


def _fma_of_the_oracle(a, b, c):
    from triton.runtime.interpreter import TensorHandle

    data = exact_fma(_number(a), _number(b), _number(c))
    block = any(isinstance(v, tl.tensor) and v.type.is_block() for v in (a, b, c))
    return tl.tensor(
        TensorHandle(data, tl.float32), tl.block_type(tl.float32, list(data.shape)) if block else tl.float32
    )


def _fma_of_the_interpreter(a, b, c):
    return tl.fma(a, b, c)  # looked up when it runs: the interpreter puts its own in this place


# fma(a, b, c) is a * b + c of float32, rounded once, in kernels.
fma = tl.fma
if INTERPRETED:
    fma = _fma_of_the_interpreter if VERSION >= (3, 9) else _fma_of_the_oracle


@helper
def widen(x):
    """float32 of a block of any dtype, exactly."""
    if _INTERPRETED:
        if x.dtype == tl.bfloat16:
            result = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        else:
            result = x.to(tl.float32)
    else:
        result = x.to(tl.float32)
    return result


@helper
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


@helper
def pointer(address, DTYPE: tl.constexpr):
    """The int64 `address` as a pointer to elements of the dtype of the code DTYPE."""
    if DTYPE == FLOAT32:
        result = address.to(tl.int64).to(tl.pointer_type(tl.float32))
    elif DTYPE == BFLOAT16:
        result = address.to(tl.int64).to(tl.pointer_type(tl.bfloat16))
    else:
        result = address.to(tl.int64).to(tl.pointer_type(tl.float16))
    return result
