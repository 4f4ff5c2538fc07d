"""Directions as random numbers: 1.3e8 draws against the distribution that the specification defines.

Seeds are fixed, so a test passes always or never. Limits are in standard errors (SE) of the statistic; where a test
takes the worst of many, the limit allows for that.
"""

import math

import numpy as np
import pytest
import torch

from adazeta_kernels import derive_seeds, fill_normal_

CHUNK = 1 << 22
CHUNKS = 32
DRAWS = CHUNK * CHUNKS  # 1.34e8
EDGES = torch.linspace(-6, 6, 4097, dtype=torch.float64)
TAILS = (3.0, 4.0, 4.5, 5.0, 5.5)
LAGS = (1, 2, 3, 4, 5, 7, 8, 64, 2048)

pytestmark = pytest.mark.slow


def draw(seed, first, numel=CHUNK, distribution="gaussian"):
    return fill_normal_(torch.empty(numel), seed, offset=first, distribution=distribution)


@pytest.fixture(scope="module")
def sums():
    """One pass over all draws: sums of powers, a histogram, tails, extremes, sums of products at a distance."""
    powers = torch.zeros(9, dtype=torch.float64)
    counts = torch.zeros(len(EDGES) - 1, dtype=torch.float64)
    tails = dict.fromkeys(TAILS, 0)
    products = dict.fromkeys(LAGS, 0.0)
    square_products = dict.fromkeys(LAGS, 0.0)
    largest = 0.0
    for chunk in range(CHUNKS):
        z = draw(2024, chunk * CHUNK)
        square = z * z
        for lag in LAGS:
            products[lag] += torch.dot(z[:-lag], z[lag:]).item()
            square_products[lag] += torch.dot(square[:-lag] - 1, square[lag:] - 1).item()
        counts += torch.histc(z, bins=len(EDGES) - 1, min=-6, max=6).double()
        magnitude = z.abs_()
        largest = max(largest, magnitude.max().item())
        for tail in TAILS:
            tails[tail] += int((magnitude > tail).sum())
        z = draw(2024, chunk * CHUNK).double()
        power = torch.ones_like(z)
        for p in range(9):
            powers[p] += power.sum()
            power *= z
    return {
        "powers": powers,
        "counts": counts,
        "tails": tails,
        "largest": largest,
        "products": products,
        "square_products": square_products,
    }


def squared_radii(last):
    """-2 ln u of the smallest `last` values of u: the largest squared radii."""
    return -2 * np.log(np.arange(1, last + 1) * 2.0**-24)


def exact_moment(p):
    """E z^p of the specification's grid of radii: E r^p E cos^p, the second exact for even p."""
    mean_power_of_cosine = math.comb(p, p // 2) / 2**p
    return (squared_radii(2**24) ** (p // 2)).mean() * mean_power_of_cosine


def normal_moment(p):
    return 0.0 if p % 2 else math.prod(range(1, p, 2))


def test_count(sums):
    assert sums["powers"][0] == DRAWS >= 1e8
    assert sums["counts"].sum() == DRAWS


@pytest.mark.parametrize("p", range(1, 9))
def test_moments(sums, p):
    got = (sums["powers"][p] / DRAWS).item()
    se = math.sqrt((normal_moment(2 * p) - normal_moment(p) ** 2) / DRAWS)
    want = 0.0 if p % 2 else exact_moment(p)
    assert abs(got - want) < 4 * se
    # The cut at 5.77 and the grid of radii shift no moment by more than a standard error of 1e8 draws.
    assert abs(want - normal_moment(p)) < se


def test_kolmogorov_smirnov(sums):
    """At the edges of 4096 bins. D sqrt(n) exceeds 1.95 once in 1,000 times."""
    from scipy.stats import norm

    empirical = torch.cumsum(sums["counts"], 0) / DRAWS
    distance = np.abs(empirical.numpy() - norm.cdf(EDGES[1:].numpy())).max()
    assert distance * math.sqrt(DRAWS) < 1.95


def test_bins(sums):
    """Chi-square of the bins that expect at least 50 draws."""
    from scipy.stats import chi2, norm

    expected = DRAWS * np.diff(norm.cdf(EDGES.numpy()))
    kept = expected >= 50
    statistic = ((sums["counts"].numpy() - expected)[kept] ** 2 / expected[kept]).sum()
    assert 1e-4 < chi2.sf(statistic, kept.sum() - 1) < 1 - 1e-4


@pytest.mark.parametrize("tail", TAILS)
def test_tails_against_the_truncated_distribution(sums, tail):
    """P(|r cos t| > tail) is the mean over radii of 2/pi arccos(tail / r): the cut at 5.77 included."""
    last = int(2**24 * math.exp(-tail * tail / 2))
    expected = DRAWS * 2 / math.pi * np.arccos(tail / np.sqrt(squared_radii(last))).sum() * 2.0**-24
    assert abs(sums["tails"][tail] - expected) < 4 * math.sqrt(expected) + 1
    assert expected > 2


def test_nothing_beyond_the_truncation(sums):
    assert 5.3 < sums["largest"] <= float.fromhex("0x1.7128acp+2")


@pytest.mark.parametrize("lag", LAGS)
def test_elements_at_a_distance_are_uncorrelated(sums, lag):
    """Products, and products of squares, which would show a radius shared beyond its pair."""
    pairs = CHUNKS * (CHUNK - lag)
    assert abs(sums["products"][lag]) < 4.5 * math.sqrt(pairs)
    assert abs(sums["square_products"][lag]) < 4.5 * 2 * math.sqrt(pairs)  # var(z^2 - 1) = 2


def correlation_in_se(x, y):
    return (torch.dot(x, y) / math.sqrt(len(x))).item()


def test_directions_of_related_seeds_are_uncorrelated():
    n = 1 << 20
    seeds = [0, 1, 2, 3, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    directions = [draw(seed, 0, n) for seed in seeds]
    worst = max(abs(correlation_in_se(a, b)) for i, a in enumerate(directions) for b in directions[:i])
    assert worst < 4.2


def test_directions_of_queries_and_steps_are_uncorrelated():
    n = 1 << 18
    seeds = [seed for step in range(3) for seed in derive_seeds(7, step, 20)]
    matrix = torch.stack([draw(seed, 0, n) for seed in seeds])
    gram = (matrix @ matrix.T) / math.sqrt(n)
    assert gram.fill_diagonal_(0).abs().max() < 4.8  # 1,770 pairs
    # One element over many queries is a sample like any other.
    across = torch.stack([draw(seed, 12345, 8) for seed in derive_seeds(7, 0, 20_000)])
    assert across.mean(0).abs().max() < 4 / math.sqrt(20_000)
    assert (across.var(0) - 1).abs().max() < 4 * math.sqrt(2 / 20_000)


def test_rademacher():
    """Mean, correlation at distances up to across blocks, and every pattern of eight neighbours equally often."""
    n, chunks = 1 << 22, 8
    mean, products = 0.0, dict.fromkeys((1, 2, 31, 32, 33, 127, 128, 129), 0.0)
    patterns = torch.zeros(256, dtype=torch.float64)
    for chunk in range(chunks):
        z = draw(99, chunk * n, n, "rademacher")
        assert torch.equal(z.abs(), torch.ones_like(z))
        mean += z.sum().item()
        for lag in products:
            products[lag] += torch.dot(z[:-lag], z[lag:]).item()
        codes = ((z.view(-1, 8) > 0).int() << torch.arange(8, dtype=torch.int32)).sum(1)
        patterns += torch.bincount(codes, minlength=256)
    assert abs(mean) < 4 * math.sqrt(n * chunks)
    for lag, total in products.items():
        assert abs(total) < 4 * math.sqrt(n * chunks), lag
    expected = n * chunks / 8 / 256
    chi_square = ((patterns - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)
