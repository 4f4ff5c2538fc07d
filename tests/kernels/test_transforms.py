"""torch.func and forward mode: each as plain autograd has it, or as a loop has it."""

import pytest
import torch
from torch.autograd import forward_ad

from adazeta_kernels import TTAdapterLayout, explain, low_rank_linear, tt_adapter, tt_factors, tt_linear

LAYOUT = TTAdapterLayout.auto(12, 4, 2)
X = torch.randn(2, 3, 12, dtype=torch.float64)


def numbers(dtype=torch.float64):
    return torch.randn(LAYOUT.numel, dtype=dtype) * 0.5


def loss(theta):
    """All four differentiable ops at two probes."""
    x = X.to(theta.dtype)
    factors = tt_factors(theta, LAYOUT, [1, 2], [0.1, -0.1])
    y = tt_adapter(x, factors, LAYOUT, act="gelu")
    left, right, bias, up_left, up_right, _ = LAYOUT.split_factors(factors)
    h = tt_linear(y, left, right, bias)
    return low_rank_linear(h, y, up_left, up_right).square().mean()


def gradient(theta):
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(loss(theta), theta)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_func_grad_and_jvp_are_autograds(dtype):
    theta, direction = numbers(dtype), torch.randn(LAYOUT.numel, dtype=dtype)
    expected = gradient(theta)
    torch.testing.assert_close(torch.func.grad(loss)(theta), expected)
    torch.testing.assert_close(torch.func.jacrev(loss)(theta), expected)
    _, along = torch.func.jvp(loss, (theta,), (direction,))
    torch.testing.assert_close(along, expected @ direction)
    with forward_ad.dual_level():
        _, along = forward_ad.unpack_dual(loss(forward_ad.make_dual(theta, direction)))
    torch.testing.assert_close(along, expected @ direction)


def test_forward_mode_through_half_precision_hidden_states():
    x, along = X.bfloat16(), torch.randn_like(X)
    factors = tt_factors(numbers(torch.float32), LAYOUT, [1, 2], [0.1, -0.1])
    _, got = torch.func.jvp(lambda x: tt_adapter(x, factors, LAYOUT), (x,), (along.bfloat16(),))
    _, exact = torch.func.jvp(lambda x: tt_adapter(x, factors.double(), LAYOUT), (x.double(),), (along,))
    assert got.dtype == torch.bfloat16 and not torch.equal(got, along.bfloat16())
    torch.testing.assert_close(got.double(), exact, rtol=0.03, atol=0.03)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop():
    thetas = torch.stack([numbers(), numbers()])
    torch.testing.assert_close(torch.func.vmap(loss)(thetas), torch.stack([loss(t) for t in thetas]))
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(loss))(thetas), torch.stack([gradient(t) for t in thetas])
    )


def test_a_named_backend_without_derivatives_is_refused():
    theta = numbers(torch.float32)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="'native' cannot run tt_factors .* forward-mode"):
        tt_factors(theta, LAYOUT, [1], [0.1], backend="native")
    with forward_ad.dual_level():
        assert explain(tt_factors, theta, LAYOUT, [1], [0.1]).backend == "reference"
    assert explain(tt_factors, theta, LAYOUT, [1], [0.1]).backend != "reference"
