"""Forward-mode differentiation: the ops without a derivative of their own leave it to the reference, or refuse."""

import pytest
import torch
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

from adazeta_kernels import TTAdapterLayout, fill_normal_, low_rank_linear, perturb_, tt_adapter, tt_factors, tt_linear

LAYOUT = TTAdapterLayout.auto(24, 8, 2)
X, BASE, LEFT, RIGHT = torch.randn(2, 3, 24), torch.randn(2, 3, 8), torch.randn(2, 24, 4), torch.randn(2, 4, 8)
FACTORS = tt_factors(torch.randn(LAYOUT.numel), LAYOUT, [1, 2], [0.1, 0.2])
CALLS = {
    "tt_factors": (lambda theta: tt_factors(theta, LAYOUT, [1, 2], [0.1, 0.2]), torch.randn(LAYOUT.numel)),
    "tt_adapter": (lambda factors: tt_adapter(X, factors, LAYOUT, act="gelu"), FACTORS),
    "tt_adapter_bf16": (lambda factors: tt_adapter(X.bfloat16(), factors, LAYOUT, act="gelu"), FACTORS),
    "tt_linear": (lambda left: tt_linear(X, left, RIGHT), LEFT),
    "low_rank_linear": (lambda base: low_rank_linear(X, base, LEFT, RIGHT), BASE),
}


@pytest.mark.parametrize("name", CALLS)
def test_tangents_are_those_of_backward(name):
    call, primal = CALLS[name]
    direction = torch.randn(primal.shape)
    with dual_level():
        tangent = unpack_dual(call(make_dual(primal, direction))).tangent
    leaf = primal.clone().requires_grad_()
    out = call(leaf)
    weights = torch.randn(out.shape).to(out.dtype)
    (gradient,) = torch.autograd.grad(out, leaf, weights)
    difference = (weights * tangent).sum() - (gradient * direction).sum()
    assert tangent.any() and difference.abs() < 2 * torch.finfo(out.dtype).eps * weights.norm() * tangent.norm()


def test_what_is_written_in_place_may_carry_none():
    plain = torch.zeros(4)
    with dual_level():
        dual = make_dual(plain, torch.ones(4))
        with pytest.raises(ValueError, match="perturb_: a tensor carries a tangent"):
            perturb_([torch.zeros(2), dual], [1], [1.0])
        with pytest.raises(ValueError, match="fill_normal_: a tensor carries a tangent"):
            fill_normal_(dual, 1)
        assert torch.equal(plain, torch.zeros(4))
        perturb_([plain.clone()], [1], [1.0])
