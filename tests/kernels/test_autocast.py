"""torch.autocast changes neither the dtype of a result nor a bit of it: factors are never rounded. Nor is an operand of
the reference, where torch may round those of float32 products."""

import pytest
import torch

from adazeta_kernels import TTAdapterLayout, low_rank_linear, tt_adapter, tt_factors, tt_linear

LAYOUT = TTAdapterLayout.auto(24, 8, 2)


def results(backend, dtype, grad):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_(grad)

    x, base, left, right = random(2, 3, 24).to(dtype), random(2, 3, 8).to(dtype), random(2, 24, 4), random(2, 4, 8)
    factors = tt_factors(random(LAYOUT.numel), LAYOUT, [1, 2], [1e-3, -1e-3], backend=backend)
    return [
        factors,
        tt_adapter(x, factors, LAYOUT, backend=backend),
        tt_linear(x, left, right, random(2, 8), backend=backend),
        low_rank_linear(x, base, left, right, backend=backend),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend, grad", [("native", False), ("reference", False), ("reference", True)])
def test_autocast_changes_nothing(backend, grad, dtype):
    plain = results(backend, dtype, grad)
    with torch.autocast("cpu", torch.bfloat16):
        for got, want in zip(results(backend, dtype, grad), plain):
            assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_reference_rounds_no_operand(precision, grad):
    before = torch.get_float32_matmul_precision()
    plain = results("reference", torch.float32, grad)
    try:
        torch.set_float32_matmul_precision(precision)
        got, wide = (results("reference", dtype, grad) for dtype in (torch.float32, torch.float64))
    finally:
        torch.set_float32_matmul_precision(before)
    for one, exact, as_ever in zip(got, wide, plain):
        assert torch.equal(one, exact.to(torch.float32))
        torch.testing.assert_close(one, as_ever, rtol=1e-5, atol=1e-5)


def test_tensors_without_a_kind_of_autocast():
    left = torch.zeros(1, 24, 4, device="meta", requires_grad=True)
    assert tt_linear(torch.zeros(1, 3, 24, device="meta"), left, torch.zeros(1, 4, 8, device="meta")).is_meta
