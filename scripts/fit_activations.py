"""Fit the polynomials of csrc/include/adazeta/activation.h and print their float32 coefficients.

    python scripts/fit_activations.py

    gelu  -ln(2 Phi(-t)) = t P(t)             t in [0, 6.5]: error of t Phi(-t) minimised, absolute
    exp   exp(f) = 1 + f + f^2 E(f)           |f| <= ln(2) / 2: relative error minimised

Phi is the distribution function of the standard normal. Weighted least squares, the weights moved to where the error is
largest (Lawson's algorithm), gives nearly the minimax polynomial.
"""

import numpy as np
from scipy.special import log_ndtr


def lawson(points, values, weights, powers, iterations=80):
    """Coefficients c of sum_k c_k x^powers[k] with a small maximum of |weight (p(x) - value)|, and that maximum."""
    basis = np.stack([points**p for p in powers], axis=1)
    emphasis = np.ones_like(points)
    best = (np.inf, None)
    for _ in range(iterations):
        scaled = np.sqrt(emphasis) * weights
        coefficients, *_ = np.linalg.lstsq(basis * scaled[:, None], values * scaled, rcond=None)
        error = np.abs((basis @ coefficients - values) * weights)
        if error.max() < best[0]:
            best = (error.max(), coefficients)
        emphasis *= error + 1e-3 * error.max()
        emphasis /= emphasis.sum()
    return best[1], best[0]


def chebyshev_points(low, high, count=4001):
    return low + (high - low) * (1 - np.cos(np.linspace(0, np.pi, count))) / 2


def main():
    t = chebyshev_points(0.0, 6.5)[1:]
    exponent = -(np.log(2) + log_ndtr(-t))
    # Where exp(-exponent) is tiny only the growth of the polynomial matters: it must not turn back.
    gelu, error = lawson(t, exponent, np.exp(-exponent) + 1e-3, range(1, 11))
    beyond = np.linspace(6.5, 1e3, 100_000)
    assert np.polyval(np.r_[gelu[::-1], 0.0], beyond).min() > 20
    show("gelu, P", gelu, error)
    f = chebyshev_points(-0.3466, 0.3466)
    f = f[np.abs(f) > 1e-9]
    show("exp, E", *lawson(f, (np.expm1(f) - f) / f**2, f**2 / np.exp(f), range(5)))


def show(name, coefficients, error):
    print(f"{name}: weighted error {error:.2e}; from the lowest power")
    for c in coefficients:
        print(f"  {float(np.float32(c)).hex()}f")


if __name__ == "__main__":
    main()
