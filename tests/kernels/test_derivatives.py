"""Derivatives by torch.func and by forward mode are those of plain autograd, vmap is a loop; what has none refuses."""

import pytest
import torch
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

from adazeta_kernels import (
    TTAdapterLayout,
    explain,
    fill_normal_,
    low_rank_linear,
    perturb_,
    tt_adapter,
    tt_factors,
    tt_linear,
)

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
    with dual_level():
        _, along = unpack_dual(loss(make_dual(theta, direction)))
    torch.testing.assert_close(along, expected @ direction)


WIDE = TTAdapterLayout.auto(24, 8, 2)
WIDE_X, BASE, LEFT, RIGHT = torch.randn(2, 3, 24), torch.randn(2, 3, 8), torch.randn(2, 24, 4), torch.randn(2, 4, 8)
FACTORS = tt_factors(torch.randn(WIDE.numel), WIDE, [1, 2], [0.1, 0.2])
CALLS = {
    "tt_factors": (lambda theta: tt_factors(theta, WIDE, [1, 2], [0.1, 0.2]), torch.randn(WIDE.numel)),
    "tt_adapter": (lambda factors: tt_adapter(WIDE_X, factors, WIDE, act="gelu"), FACTORS),
    "tt_adapter_bf16": (lambda factors: tt_adapter(WIDE_X.bfloat16(), factors, WIDE, act="gelu"), FACTORS),
    "tt_linear": (lambda left: tt_linear(WIDE_X, left, RIGHT), LEFT),
    "low_rank_linear": (lambda base: low_rank_linear(WIDE_X, base, LEFT, RIGHT), BASE),
}


@pytest.mark.parametrize("name", CALLS)
def test_tangents_of_one_op_are_those_of_backward(name):
    call, primal = CALLS[name]
    direction = torch.randn(primal.shape)
    with dual_level():
        tangent = unpack_dual(call(make_dual(primal, direction))).tangent
    leaf = primal.clone().requires_grad_()
    out = call(leaf)
    weights = torch.randn(out.shape).to(out.dtype)
    (slope,) = torch.autograd.grad(out, leaf, weights)
    difference = (weights * tangent).sum() - (slope * direction).sum()
    assert tangent.any() and difference.abs() < 2 * torch.finfo(out.dtype).eps * weights.norm() * tangent.norm()


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
    with dual_level(), pytest.raises(RuntimeError, match="'native' cannot run tt_factors .* forward-mode"):
        tt_factors(theta, LAYOUT, [1], [0.1], backend="native")
    with dual_level():
        assert explain(tt_factors, theta, LAYOUT, [1], [0.1]).backend == "reference"
    assert explain(tt_factors, theta, LAYOUT, [1], [0.1]).backend != "reference"


WRITES = {
    "perturb_": lambda tensor: perturb_([torch.zeros(2), tensor], [1], [1.0], decay=0.5),
    "fill_normal_": lambda tensor: fill_normal_(tensor, 1),
}


@pytest.mark.parametrize("op", WRITES)
def test_what_is_written_in_place_may_carry_no_tangent(op):
    """It would keep the tangent that it had, which is not that of the result."""
    refused = pytest.raises(ValueError, match=f"{op}: a tensor carries a tangent")
    plain, direction = torch.zeros(4), torch.ones(4)
    with dual_level():
        dual = make_dual(plain, direction)
        with refused:
            WRITES[op](dual)
        assert torch.equal(plain, torch.zeros(4))
        WRITES[op](plain.clone())

    def written(x):
        x = x * 2
        WRITES[op](x)
        return x

    with refused:
        torch.func.jvp(written, (plain,), (direction,))
    with torch.no_grad(), refused:
        torch.func.jvp(written, (plain,), (direction,))
    _, along = torch.func.jvp(lambda x: x * 2 + written(x.detach()), (plain,), (direction,))
    assert torch.equal(along, 2 * direction)
