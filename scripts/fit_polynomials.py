"""Fit the polynomials of docs/perturbation-spec.md and print their float32 coefficients.

    python scripts/fit_polynomials.py

Three functions of one float32 argument are approximated, each on the interval that exact integer reduction leaves:

    log   -2 ln(1 - a) = a Q(a)       a in [1 - sqrt 2, 1 - sqrt 1/2]     relative error minimised
    sin   sin(pi/2 x) = x S(x^2)      x in [-1/2, 1/2] quarter turns      relative error minimised
    cos   cos(pi/2 x) = 1 + y C(y)    y = x^2 in [0, 1/4]                 absolute error minimised

Remez exchange in 40 digits gives the minimax polynomial, whose coefficients are rounded to float32. Q(0) is held at
exactly 2, so that radii near 0 keep their relative accuracy.
"""

import mpmath as mp
import numpy as np

mp.mp.dps = 40


def remez(function, weight, powers, low, high, iterations=12):
    """Return minimax coefficients c of sum_k c_k x^powers[k] against `function`, and the weighted maximum error.

    The error minimised is weight(x) * (p(x) - function(x)) on [low, high].
    """
    n = len(powers)
    low, high = mp.mpf(low), mp.mpf(high)
    nodes = [(low + high) / 2 + (high - low) / 2 * mp.cos(mp.pi * (n - i) / n) for i in range(n + 1)]
    grid = np.linspace(0, 1, 801)
    coefficients = [mp.mpf(0)] * n
    for _ in range(iterations):
        rows = [[x**p for p in powers] + [(-1) ** i / weight(x)] for i, x in enumerate(nodes)]
        solution = mp.lu_solve(mp.matrix(rows), mp.matrix([function(x) for x in nodes]))
        coefficients = [solution[k] for k in range(n)]

        def error(x, coefficients=coefficients):
            value = sum(c * x**p for c, p in zip(coefficients, powers, strict=True))
            return weight(x) * (value - function(x))

        # Extrema of the error: the largest value of each stretch of constant sign.
        points = [low + (high - low) * mp.mpf(float(g)) for g in grid]
        errors = [error(x) for x in points]
        extrema = []
        for x, e in zip(points, errors, strict=True):
            if extrema and mp.sign(e) == mp.sign(extrema[-1][1]):
                if abs(e) > abs(extrema[-1][1]):
                    extrema[-1] = (x, e)
            elif e != 0:
                extrema.append((x, e))
        if len(extrema) < n + 1:
            break
        while len(extrema) > n + 1:
            extrema.pop(0 if abs(extrema[0][1]) < abs(extrema[-1][1]) else -1)
        nodes = [x for x, _ in extrema]
    return coefficients, max(abs(e) for e in errors)


def fit_float32(function, weight, degree, low, high, fixed=()):
    """Return float32 coefficients in ascending powers and the weighted error of the exact polynomial they define.

    `fixed` gives the lowest coefficients; the others are fitted around them.
    """
    first = len(fixed)
    # Dividing by x^first keeps the basis free of common zeros, which the exchange needs on intervals that contain 0.
    rest, _ = remez(
        lambda x: (function(x) - sum(c * x**k for k, c in enumerate(fixed))) / x**first,
        lambda x: weight(x) * max(abs(x) ** first, mp.mpf(10) ** -9),
        list(range(degree + 1 - first)),
        low,
        high,
    )
    rounded = [np.float32(float(c)) for c in [*fixed, *rest]]
    exact = [mp.mpf(float(c)) for c in rounded]
    points = [low + (high - low) * (mp.mpf(i) + mp.mpf(1) / 3) / 1000 for i in range(1000)]
    worst = max(abs(weight(x) * (sum(c * x**k for k, c in enumerate(exact)) - function(x))) for x in points)
    return rounded, float(worst)


def log_target(a):
    """-2 ln(1 - a) / a, by its series near 0 where the quotient would cancel."""
    if abs(a) < mp.mpf(10) ** -20:
        return 2 + a
    return -2 * mp.log(1 - a) / a


def sin_target(y):
    """sin(pi/2 x) / x as a function of y = x^2."""
    x = mp.sqrt(y)
    return mp.pi / 2 if x < mp.mpf(10) ** -20 else mp.sin(mp.pi / 2 * x) / x


def cos_target(y):
    """(cos(pi/2 x) - 1) / y as a function of y = x^2."""
    if y < mp.mpf(10) ** -30:
        return -(mp.pi**2) / 8
    return -2 * mp.sin(mp.pi / 4 * mp.sqrt(y)) ** 2 / y


# name: function, weight of the error, degree, interval, coefficients held fixed
FITS = {
    "log": (log_target, lambda a: 1 / log_target(a), 8, 1 - mp.sqrt(2), 1 - mp.sqrt(mp.mpf(1) / 2), (mp.mpf(2),)),
    "sin": (sin_target, lambda y: 1 / sin_target(y), 3, mp.mpf(0), mp.mpf(1) / 4, ()),
    "cos": (cos_target, lambda y: max(y, mp.mpf(10) ** -9), 3, mp.mpf(0), mp.mpf(1) / 4, ()),
}


def main():
    for name, (function, weight, degree, low, high, fixed) in FITS.items():
        coefficients, error = fit_float32(function, weight, degree, low, high, fixed)
        print(f"{name}: degree {degree}, error of the exact polynomial {error:.2e}")
        for power, c in enumerate(coefficients):
            print(f"  c{power} = {float(c).hex():<24} {float(c)!r}")


if __name__ == "__main__":
    main()
