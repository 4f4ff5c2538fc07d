"""Products of float32 blocks on bfloat16 tensor cores, of float32 grade.

A float32 is the sum of three bfloat16 numbers to 2^-26 of it (`parts`), and bfloat16 products are exact in float32. Of
the nine products of the parts of two numbers the six largest are summed, the small ones first; what is left out is
2^-25 of the product. A bfloat16 number is one part, a float16 number two. The same code runs on every GPU: it needs no
float32 mode of a tensor core, none of which is both exact enough and found everywhere.
"""

from __future__ import annotations

import triton.language as tl

from adazeta_kernels.backends.triton.compat import BFLOAT16, FLOAT16, INTERPRETED, helper, narrow, widen

# The interpreter multiplies bfloat16 blocks by their bits; their numbers are exact as float32.
_OPERAND = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)


@helper
def parts(v):
    """Three operands, bfloat16 on a GPU, whose sum is the float32 block v to rounding: largest first."""
    high = narrow(v, BFLOAT16)
    rest = v - widen(high)
    middle = narrow(rest, BFLOAT16)
    low = narrow(rest - widen(middle), BFLOAT16)
    return high.to(_OPERAND), middle.to(_OPERAND), low.to(_OPERAND)


@helper
def parts_of(x, DTYPE: tl.constexpr):
    """`parts` of a block of any dtype; `part_count` of them are not zero."""
    if DTYPE == BFLOAT16:
        high = x.to(_OPERAND)
        return high, high, high
    if DTYPE == FLOAT16:
        wide = widen(x)
        high = narrow(wide, BFLOAT16)
        low = narrow(wide - widen(high), BFLOAT16).to(_OPERAND)
        return high.to(_OPERAND), low, low
    return parts(x)


@helper
def product(a0, a1, a2, b0, b1, b2, A_PARTS: tl.constexpr, COARSE: tl.constexpr = False):
    """float32 (m, n) of a (m, k) times b (k, n), given as parts.

    Args:
        A_PARTS: how many parts of a are not zero.
        COARSE: take three products of two parts each, an error of 2^-17: for sums that are rounded to 16 bits at once.
    """
    if COARSE:
        low = tl.dot(a1, b0)
    elif A_PARTS == 1:
        low = tl.dot(a0, b2)
    else:
        low = tl.dot(a1, b1)
        low = tl.dot(a0, b2, low)
        if A_PARTS == 3:
            low = tl.dot(a2, b0, low)
        low = tl.dot(a1, b0, low)
    low = tl.dot(a0, b1, low)
    # Where a number is infinite its other parts are NaN: there the product of the first parts alone is right.
    low = tl.where(tl.abs(low) < float("inf"), low, 0.0)
    return tl.dot(a0, b0, low)
