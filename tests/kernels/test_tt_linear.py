"""tt_linear against dense float64 matrices."""

import pytest
import torch
from kernel_cases import LOW_RANK_SHAPES

from adazeta_kernels import TTAdapterLayout, tt_adapter, tt_factors, tt_linear
from adazeta_kernels.testing import assert_as_exact_as

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [*LOW_RANK_SHAPES, (2, 0, 12, 2, 8), (2, 3, 12, 0, 8)]


def make(shape, dtype, bias):
    probes, tokens, d_in, rank, d_out = shape
    factor_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(probes, tokens, d_in).to(dtype)
    left = torch.randn(probes, d_in, rank, dtype=factor_dtype) * 0.2
    right = torch.randn(probes, rank, d_out, dtype=factor_dtype)
    return x, left, right, torch.randn(probes, d_out, dtype=factor_dtype) if bias else None


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_against_dense(shape, dtype, bias):
    x, left, right, b = make(shape, dtype, bias)
    y = tt_linear(x, left, right, b)
    assert y.shape == (shape[0], shape[1], shape[4]) and y.dtype == dtype and y.is_contiguous()
    dense = left.double() @ right.double()
    shift = 0.0 if b is None else b[:, None]
    oracle = torch.stack([x[p].double() @ dense[p] for p in range(shape[0])]) + shift
    plain = x @ left.to(dtype) @ right.to(dtype) + (0.0 if b is None else b[:, None].to(dtype))
    assert_as_exact_as(y, plain, oracle)


def test_two_linears_make_the_adapter():
    layout = TTAdapterLayout.auto(576, 64, 5)
    x = torch.randn(3, 7, 576)
    factors = tt_factors(torch.randn(layout.numel) * 0.3, layout, [1, 2, 3], [0.1] * 3)
    l1, r1, b1, l2, r2, b2 = layout.split_factors(factors)
    by_hand = x + 0.5 * tt_linear(tt_linear(x, l1, r1, b1).relu(), l2, r2, b2)
    assert torch.allclose(tt_adapter(x, factors, layout, scale=0.5), by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_gradients(bias):
    inputs = [t.requires_grad_() for t in make((2, 3, 6, 2, 5), torch.float64, bias) if t is not None]
    assert torch.autograd.gradcheck(tt_linear, inputs)
