"""Losses to coefficients, against hand-written sums, and the estimate against a gradient."""

import math

import pytest
import torch

from adazeta.estimator import coefficients, probe_signs, projected_gradients, signal_to_noise


def test_central_difference_by_hand():
    losses = torch.tensor([[[1.0, 0.5], [2.0, 3.0]]])
    assert projected_gradients(losses, 0.25, "central").tolist() == [[1.0, -2.0]]


def test_forward_difference_subtracts_the_mean_of_the_others():
    losses = torch.tensor([[[1.0], [2.0], [6.0]]])
    d = projected_gradients(losses, 0.5, "forward")
    assert d.tolist() == [[(1 - 4) / 0.5, (2 - 3.5) / 0.5, (6 - 1.5) / 0.5]]


def test_forward_difference_leaves_a_broken_query_out_of_the_baseline():
    d = projected_gradients(torch.tensor([[[1.0], [math.nan], [3.0]]]), 1.0, "forward")
    assert d[0, 0] == -2 and math.isnan(d[0, 1]) and d[0, 2] == 2


def test_groups_have_baselines_of_their_own():
    losses = torch.tensor([[[1.0], [3.0]], [[100.0], [101.0]]])
    assert projected_gradients(losses, 1.0, "forward").tolist() == [[-2.0, 2.0], [-1.0, 1.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_losses_drop_their_query_and_are_counted(bad):
    losses = torch.tensor([[[1.0, 0.0], [bad, 1.0], [3.0, 1.0]]])
    result = coefficients(projected_gradients(losses, 0.5, "central"), combine="mean")
    assert result.values == [0.5, 0.0, 1.0]  # d = 1 and 2, divided by the two queries that are left
    assert result.dropped == 1


def test_all_non_finite_gives_zero_coefficients():
    result = coefficients(torch.full((2, 3), math.nan), combine="spread")
    assert result.values == [0.0] * 6 and result.dropped == 6


def test_spread_is_free_of_the_loss_scale_until_the_floor():
    d = torch.tensor([1.0, -2.0, 2.0, 0.5])
    plain = coefficients(d, combine="spread").values
    assert coefficients(d * 1000, combine="spread").values == pytest.approx(plain)
    s = math.sqrt((1 + 4 + 4 + 0.25) / 4)
    assert plain == pytest.approx([x / (4 * s) for x in d.tolist()])
    assert coefficients(d, combine="spread", floor=10.0).values == pytest.approx([x / 40 for x in d.tolist()])


def test_zero_spread_makes_no_step():
    assert coefficients(torch.zeros(4), combine="spread").values == [0.0] * 4


def test_clipping_bounds_an_outlier():
    d = torch.tensor([1.0, 1.0, 1.0, 100.0])
    s = math.sqrt((3 + 1e4) / 4)
    result = coefficients(d, combine="mean", clip=1.5)
    assert result.values == pytest.approx([0.25, 0.25, 0.25, 1.5 * s / 4])
    assert result.clipped == 1


def test_estimate_is_the_gradient_on_average():
    """On a quadratic the central difference is exact along z, so averaging z (z . g) gives g."""
    torch.manual_seed(0)
    n, queries = 6, 40000
    a, theta = torch.randn(n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)

    def loss(t):
        return (a * t).sum(-1) + 0.5 * t.square().sum(-1)

    z = torch.randn(queries, n, dtype=torch.float64)
    eps = 1e-2
    losses = torch.stack([loss(theta + eps * z), loss(theta - eps * z)], -1)[None]
    c = coefficients(projected_gradients(losses, eps, "central"), combine="mean").values
    g = (torch.tensor(c, dtype=torch.float64)[:, None] * z).sum(0)
    true = a + theta
    assert (g - true).norm() / true.norm() < 4 * math.sqrt((n + 1) / queries)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: probe_signs("backward"), "difference must be one of"),
        (lambda: projected_gradients(torch.zeros(2, 2), 1.0, "central"), "expected losses of shape"),
        (lambda: projected_gradients(torch.zeros(1, 1, 2), 0.0, "central"), "eps must be positive"),
        (lambda: projected_gradients(torch.zeros(1, 1, 1), 1.0, "forward"), "at least 2 queries"),
        (lambda: coefficients(torch.ones(1), combine="median"), "combine must be one of"),
        (lambda: coefficients(torch.ones(1), floor=-1.0), "floor must not be negative"),
        (lambda: coefficients(torch.ones(1), floor=math.nan), "floor must not be negative, and finite, got nan"),
        (lambda: coefficients(torch.ones(1), clip=0.0), "clip must be positive"),
        (lambda: coefficients(torch.ones(1), clip=math.inf), "clip must be positive and finite, or None, got inf"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_signal_to_noise_tells_slope_from_rounding_and_curvature():
    """Of ``l = slope s + curvature s^2 + noise`` at ``s = +-1``, for many queries of three groups."""
    g = torch.Generator().manual_seed(0)
    slope, curvature = (torch.randn(3, 400, 1, generator=g, dtype=torch.float64) for _ in range(2))
    noise = torch.randn(3, 400, 2, generator=g, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    offset = torch.tensor([[[5.0]], [[7.0]], [[-3.0]]])  # groups differ in their loss
    assert signal_to_noise(offset + noise) == pytest.approx(1.0, rel=0.1)
    assert signal_to_noise(offset + 50 * slope * signs + noise) == pytest.approx(50 * 2**0.5, rel=0.1)
    assert signal_to_noise(slope * signs + 10 * curvature) == pytest.approx(0.1, rel=0.1)
    assert signal_to_noise(slope * signs) == math.inf
    some = (offset + 50 * slope * signs + noise).clone()
    some[0, ::2] = math.nan
    some[1, 1:] = math.inf
    assert signal_to_noise(some) == pytest.approx(50 * 2**0.5, rel=0.15)
    assert math.isnan(signal_to_noise(torch.ones(3, 1, 2))) and math.isnan(signal_to_noise(torch.ones(3, 4, 1)))
