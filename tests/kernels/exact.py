"""The Gaussian transform of docs/perturbation-spec.md in exact rational arithmetic: slow, and sharing no code with it.

Each float32 operation is carried out on fractions and rounded once, so neither numpy nor the processor is trusted.
"""

from fractions import Fraction
from math import floor, isqrt, log2

Coefficients = dict[str, Fraction]


def round32(x: Fraction) -> Fraction:
    """The nearest float32, ties to even, subnormals included; overflow does not occur here."""
    if x == 0:
        return x
    exponent = floor(log2(abs(x.numerator)) - log2(x.denominator))
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    return round(x / unit) * unit  # Fraction rounds half to even


def sqrt32(x: Fraction) -> Fraction:
    """The float32 nearest to the square root: 100 bits and a sticky one decide the rounding."""
    scaled = x * 4**100
    root = isqrt(floor(scaled))
    sticky = 0 if root * root == scaled else 1
    return round32(Fraction(2 * root + sticky, 2**101))


def horner(coefficients: list[Fraction], x: Fraction) -> Fraction:
    value = coefficients[0]
    for c in coefficients[1:]:
        value = round32(value * x + c)
    return value


def gaussian_pair(w: int, v: int, named: Coefficients) -> tuple[Fraction, Fraction]:
    """Elements of a pair of words, `named` holding Q0.., S0.., C0.. as the specification lists them."""

    def descending(letter):
        return [named[f"{letter}{n}"] for n in range(len(named) - 1, -1, -1) if f"{letter}{n}" in named]

    k = (w >> 8) + 1
    # k = m 2^e, sqrt 1/2 <= m < sqrt 2, with sqrt 1/2 as the float32 whose bits are 0x3F3504F3.
    e = k.bit_length()
    while Fraction(k, 2**e) < Fraction(0xB504F3, 2**24):
        e -= 1
    a = 1 - Fraction(k) / Fraction(2) ** e
    product = round32(a * horner(descending("Q"), a))
    r = sqrt32(round32((24 - e) * Fraction(float.fromhex("0x1.62e43p+0")) + product))

    n = v >> 8
    g = (n + 2**21) // 2**22
    x = Fraction(n - g * 2**22, 2**22)
    y = round32(x * x)
    sine, cosine = round32(horner(descending("S"), y) * x), round32(horner(descending("C"), y) * y + 1)
    cos, sin = [(cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine)][g % 4]
    return round32(r * cos), round32(r * sin)
