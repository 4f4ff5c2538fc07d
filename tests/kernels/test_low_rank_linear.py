"""low_rank_linear against dense float64 matrices."""

import pytest
import torch
from kernel_cases import LOW_RANK_SHAPES

from adazeta_kernels import low_rank_linear
from adazeta_kernels.testing import assert_as_exact_as

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [*LOW_RANK_SHAPES, (1, 1, 576, 8, 1536), (1, 40, 64, 1, 64), (3, 130, 77, 16, 1200), (2, 0, 12, 2, 8)]


def make(shape, dtype):
    probes, tokens, d_in, rank, d_out = shape
    factor_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x, base = torch.randn(probes, tokens, d_in).to(dtype), torch.randn(probes, tokens, d_out).to(dtype)
    a = torch.randn(probes, d_in, rank, dtype=factor_dtype) * 0.2
    return x, base, a, torch.randn(probes, rank, d_out, dtype=factor_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("scale", [1.0, -0.25, 0.0])
def test_against_dense(shape, dtype, scale):
    x, base, a, b = make(shape, dtype)
    before = base.clone()
    y = low_rank_linear(x, base, a, b, scale=scale)
    assert y.shape == base.shape and y.dtype == dtype and y.is_contiguous()
    assert torch.equal(base, before) and y.data_ptr() != base.data_ptr() or base.numel() == 0
    dense = a.double() @ b.double()
    oracle = base.double() + scale * torch.stack([x[p].double() @ dense[p] for p in range(shape[0])])
    assert_as_exact_as(y, base + scale * (x @ a.to(dtype) @ b.to(dtype)), oracle)
    if scale == 0.0:
        assert torch.equal(y, base)


def test_gradients():
    inputs = [t.requires_grad_() for t in make((2, 3, 6, 2, 5), torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: low_rank_linear(*t, scale=0.5), inputs)


def test_base_alone_requiring_grad_is_not_written():
    x, base, a, b = make((2, 3, 6, 2, 5), torch.float32)
    base.requires_grad_()
    before = base.detach().clone()
    low_rank_linear(x, base, a, b).sum().backward()
    assert torch.equal(base.grad, torch.ones_like(base)) and torch.equal(base.detach(), before)
