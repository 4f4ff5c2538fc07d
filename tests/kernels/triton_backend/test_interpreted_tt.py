"""The TT ops in Triton's interpreter: against float64 at the error of plain torch, on ragged shapes of every dtype."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import (
    DEEP,
    DTYPES,
    EPS,
    LAYOUTS,
    adapter_inputs,
    alone,
    assert_activations,
    assert_infinities,
    dtype_id,
    low_rank_inputs,
)

import adazeta_kernels as kernels
from adazeta_kernels import TTAdapterLayout
from adazeta_kernels.backends import triton as backend
from adazeta_kernels.backends.reference import tt as reference
from adazeta_kernels.backends.triton import activation, products
from adazeta_kernels.backends.triton.launch import Configuration
from adazeta_kernels.checks import ACTS
from adazeta_kernels.testing import assert_as_exact_as

CONTRACTED = LAYOUTS | {"16-cores": DEEP}
# As on a GPU: several tiles of tokens, of columns, of rows.
TILES = Configuration((("TOKENS", 16), ("WIDTH", 32)))
BLOCKS = Configuration((("ROWS", 16), ("COLUMNS", 32)))

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def assert_adapter(x, factors, layout, act, scale, **kwargs):
    y = backend.tt_adapter(x, factors, layout, act, scale, **kwargs)
    exact = reference.apply_adapter(x.double(), factors.double(), layout, act, scale)
    assert_as_exact_as(y, reference.tt_adapter(x, factors, layout, act, scale), exact)
    return y


def assert_factors(layout, distribution="gaussian", **forced):
    theta, offset = torch.randn(layout.numel) * 0.3, 2**33 + 5
    seeds, scales = torch.tensor([0, -1]), torch.tensor([0.0, -0.5])
    rows = backend.perturb_rows(theta, seeds, scales, offset, distribution)
    assert torch.equal(rows[0], theta)
    plain, exact = (layout.split_factors(reference.contract_cores(r, layout)) for r in (rows, rows.double()))
    factors = backend.tt_factors(theta, layout, seeds, scales, offset, distribution, **forced)[0]
    assert factors.shape == (2, layout.factor_numel)
    for position, (a, b, c) in enumerate(zip(layout.split_factors(factors), plain, exact, strict=True)):
        if position in (2, 5):  # a bias is not contracted
            assert (a is None and b is None) or torch.equal(a, b)
        else:
            assert_as_exact_as(a, b, c)


@pytest.mark.parametrize("layout", CONTRACTED.values(), ids=list(CONTRACTED))
def test_factors_are_those_of_the_perturbed_cores(layout):
    assert_factors(layout)


def test_factors_of_rademacher_directions():
    assert_factors(LAYOUTS["unequal"], "rademacher")


def test_factors_in_blocks_as_on_a_gpu():
    """Several blocks of rows and of columns, and two programs a chain."""
    assert_factors(LAYOUTS["unequal"], configuration=BLOCKS, shares=2)


def test_every_adapter_is_what_it_is_alone():
    layout, offset = LAYOUTS["77-6-r4"], 2**40 - 100
    theta = torch.randn(2 * layout.numel)
    together = kernels.tt_factors(
        theta, layout, [3, 2**64 - 1], [0.1, -2.0], offset=offset, adapters=2, backend="triton"
    )
    assert together.shape == (2, 2, layout.factor_numel)
    for a, part in enumerate(theta.split(layout.numel)):
        at = offset + a * layout.numel
        alone = kernels.tt_factors(part, layout, [3, 2**64 - 1], [0.1, -2.0], offset=at, backend="triton")
        assert torch.equal(together[a], alone)


def test_theta_is_only_read_and_only_the_result_is_written():
    layout = LAYOUTS["45-15-r7-nobias"]
    guarded = torch.full((layout.numel + 20,), 7.0)
    theta = guarded[10:-10].normal_()
    before = guarded.clone()
    strided = torch.stack([theta, -theta], 1)[:, 0]
    factors = backend.tt_factors(theta, layout, torch.tensor([1]), torch.tensor([0.5]), 3, "gaussian")
    assert torch.equal(
        factors, backend.tt_factors(strided, layout, torch.tensor([1]), torch.tensor([0.5]), 3, "gaussian")
    )
    assert torch.equal(guarded, before) and factors.isfinite().all()


@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_adapter_on_ragged_shapes(layout, dtype):
    for probes, tokens in ((1, 1), (2, 19)):
        x, factors = adapter_inputs(layout, probes, tokens, dtype)
        before = x.clone()
        assert_adapter(x, factors, layout, "relu", 0.7)
        assert torch.equal(x, before)


@all_dtypes
def test_adapter_in_tiles_as_on_a_gpu(dtype):
    """Several tiles of tokens and of columns, the last ones with less."""
    layout = LAYOUTS["77-6-r4"]
    x, factors = adapter_inputs(layout, 2, 19, dtype)
    assert_adapter(x, factors, layout, "silu", 1.3, configuration=TILES)


@pytest.mark.parametrize("shares", [2, 7])
def test_adapter_by_several_programs_a_tile(shares):
    """With columns for all of them, and for some only; the sum has a fixed order."""
    layout, few = LAYOUTS["576-64-r5"], Configuration((("TOKENS", 16), ("WIDTH", 128)))
    x, factors = adapter_inputs(layout, 1, 5, torch.bfloat16)
    forced = {"configuration": few, "shares": shares}
    y = assert_adapter(x, factors, layout, "gelu", -0.5, **forced)
    if shares == 2:
        assert torch.equal(y, backend.tt_adapter(x, factors, layout, "gelu", -0.5, **forced))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_activations(act, bias):
    layout = TTAdapterLayout.auto(120, 40, (2, 3, 4, 3, 2), bias=bias)
    x, factors = adapter_inputs(layout, 2, 5, torch.float32)
    for scale in (1.0, 0.0):
        y = assert_adapter(x, factors, layout, act, scale)
    assert torch.equal(y, x)


@triton.jit
def apply(x, out, ACT: tl.constexpr, COUNT: tl.constexpr):
    lanes = tl.arange(0, COUNT)
    tl.store(out + lanes, activation.activate(tl.load(x + lanes), ACT))


def test_activation_errors_in_units_of_rounding():
    small = torch.logspace(-30, 0, 2048)
    x = torch.cat([torch.linspace(-20, 20, 8192), small, -small, torch.linspace(-100, 100, 4032), torch.zeros(64)])
    activated, nan = {}, torch.full((1,), torch.nan)
    for act, code in activation.ACTS.items():
        activated[act], of_nan = torch.empty_like(x), torch.zeros(1)
        apply[(1,)](x, activated[act], ACT=code, COUNT=len(x))
        apply[(1,)](nan, of_nan, ACT=code, COUNT=1)
        assert of_nan.isnan()
    assert_activations(x, activated)


def test_activations_of_infinities():
    def activated(act, values):
        out = torch.empty_like(values)
        apply[(1,)](values, out, ACT=activation.ACTS[act], COUNT=len(values))
        return out

    assert_infinities(activated)


def assert_low_rank(inputs, **forced):
    x, base, left, right, bias = inputs
    exact = [t.double() for t in inputs]
    product = exact[0] @ exact[2] @ exact[3]
    y = backend.tt_linear(x, left, right, bias, **forced)
    assert_as_exact_as(y, reference.tt_linear(x, left, right, bias), product + exact[4][:, None])
    y = backend.low_rank_linear(x, base, left, right, -0.3, **forced)
    assert_as_exact_as(y, reference.low_rank_linear(x, base, left, right, -0.3), exact[1] - 0.3 * product)


@all_dtypes
@pytest.mark.parametrize("rank", [1, 13, 64])
def test_low_rank_maps(rank, dtype):
    for probes, tokens, d_out in ((1, 1, 83), (2, 19, 5)):
        assert_low_rank(low_rank_inputs(probes, tokens, 77, rank, d_out, dtype))


@pytest.mark.parametrize("shares", [1, 2])
def test_low_rank_maps_in_tiles_as_on_a_gpu(shares):
    inputs = low_rank_inputs(2, 19, 140, 17, 83, torch.bfloat16)
    assert_low_rank(inputs, configuration=TILES, shares=shares)


def test_a_map_without_bias():
    x, _, left, right, _ = low_rank_inputs(2, 3, 77, 5, 83, torch.float32)
    product = x.double() @ left.double() @ right.double()
    assert_as_exact_as(backend.tt_linear(x, left, right, None), reference.tt_linear(x, left, right, None), product)


def test_inputs_of_any_stride():
    layout = LAYOUTS["12-8-r1"]
    x, factors = adapter_inputs(layout, 3, 8, torch.bfloat16)
    expected = backend.tt_adapter(x, factors, layout, "relu", 1.0)
    padded = torch.cat([factors, factors + 1], 1)[:, : factors.shape[1]]
    turned = factors.t().contiguous().t()
    every_other = torch.stack([x, -x], dim=2).flatten(1, 2)[:, ::2]
    for x_in, f_in in ((x, padded), (x, turned), (every_other, factors)):
        assert torch.equal(backend.tt_adapter(x_in, f_in, layout, "relu", 1.0), expected)
    l1, r1, b1, *_ = layout.split_factors(factors)
    dense = backend.tt_linear(x, l1.contiguous(), r1.contiguous(), b1.contiguous())
    assert torch.equal(backend.tt_linear(x, l1, r1, b1), dense)


def test_no_tokens():
    layout = LAYOUTS["12-8-r1"]
    x, factors = adapter_inputs(layout, 2, 0, torch.float16)
    assert kernels.tt_adapter(x, factors, layout, backend="triton").shape == (2, 0, 12)
    x, base, left, right, bias = low_rank_inputs(2, 0, 7, 3, 5, torch.float32)
    assert kernels.tt_linear(x, left, right, bias, backend="triton").shape == (2, 0, 5)
    assert kernels.low_rank_linear(x, base, left, right, backend="triton").shape == (2, 0, 5)


def test_infinities_and_nan_stay_in_their_rows():
    layout = LAYOUTS["12-8-r1"]
    for dtype in DTYPES:
        x, factors = adapter_inputs(layout, 1, 20, dtype)
        big = torch.full((1, 12, 1), 1e30)
        assert backend.tt_linear(x.abs() + 1, big, big.mT, None).isinf().all()
        clean = backend.tt_adapter(x, factors, layout, "identity", 1.0)
        for value in (float("nan"), float("inf"), float("-inf")):
            spoiled = x.clone()
            spoiled[0, 3, 0] = value
            y = backend.tt_adapter(spoiled, factors, layout, "identity", 1.0)
            plain = reference.tt_adapter(spoiled, factors, layout, "identity", 1.0)
            assert torch.equal(y[0, 3].isnan(), plain[0, 3].isnan()) and not y[0, 3].isfinite().any()
            others = torch.arange(20) != 3
            assert torch.equal(y[0, others], clean[0, others])


def test_infinite_hidden_values_do_not_meet_the_zeros_that_pad_ranks():
    def adapted(act, values):
        x, factors, layout = alone(values)
        return backend.tt_adapter(x, factors, layout, act, 1.0)[:, 0, 0]

    with np.errstate(all="ignore"):  # the interpreter is numpy
        assert_infinities(adapted)
        for layout in (LAYOUTS["77-6-r4"], LAYOUTS["576-64-r5"]):
            x, factors = adapter_inputs(layout, 1, 5, torch.float32)
            x, factors = x.abs() + 0.1, factors.abs() + 0.1
            x[0, 2, 0] = float("inf")
            *_, bias, _, _, _ = layout.split_factors(factors)
            bias[0, 1] = 3e38  # which overflows where it is multiplied
            for forced in ({}, {"configuration": TILES, "shares": 2}):
                assert backend.tt_adapter(x, factors, layout, "relu", 1e3, **forced).isposinf().all()
        x, base, left, right, bias = (t.abs() + 0.1 for t in low_rank_inputs(1, 5, 77, 13, 83, torch.bfloat16))
        x[0, 2, 0] = float("inf")
        y = backend.tt_linear(x, left, right, bias)
        assert y[:, 2].isposinf().all() and y[:, 3].isfinite().all()
        assert backend.low_rank_linear(x, base, left, right, -0.3)[:, 2].isneginf().all()


@triton.jit
def multiply(a, b, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M)[:, None], tl.arange(0, K), tl.arange(0, N)[None, :]
    a0, a1, a2 = products.parts(tl.load(a + m * K + k[None, :]))
    b0, b1, b2 = products.parts(tl.load(b + k[:, None] * N + n))
    tl.store(out + m * N + n, products.product(a0, a1, a2, b0, b1, b2, 3))


def test_products_of_parts_are_of_float32_grade():
    a, b, got = torch.randn(32, 16) * torch.logspace(-20, 15, 32)[:, None], torch.randn(16, 64), torch.empty(32, 64)
    multiply[(1,)](a, b, got, M=32, K=16, N=64)
    size = a.double().abs() @ b.double().abs()
    assert ((got - a.double() @ b.double()).abs() <= 8 * EPS * size).all()
    one = torch.eye(16)[:, :16].repeat(2, 1)  # parts add up to the number itself
    multiply[(1,)](one, b, got, M=32, K=16, N=64)
    assert torch.equal(got, b.repeat(2, 1))
    a[:] = 1.0
    b[3, 5], b[4, 6] = float("inf"), float("-inf")
    with np.errstate(all="ignore"):  # the interpreter is numpy
        multiply[(1,)](a, b, got, M=32, K=16, N=64)
    assert got[:, 5].isposinf().all() and got[:, 6].isneginf().all() and got[:, 7:].isfinite().all()


def test_limits_are_told():
    x, _, left, right, _ = low_rank_inputs(1, 2, 80, 65, 70, torch.float32)
    with pytest.raises(RuntimeError, match="rank 65 is above the Triton kernels' limit of 64"):
        kernels.tt_linear(x, left, right, backend="triton")
    with pytest.raises(RuntimeError, match="no Triton kernel of tt_linear for torch.float64"):
        kernels.tt_linear(x.double(), left[..., :2], right[:, :2], backend="triton")
    with pytest.raises(ValueError, match="x has width 3, expected 12"):
        kernels.tt_adapter(torch.zeros(1, 1, 3), torch.zeros(1, 9), LAYOUTS["12-8-r1"], backend="triton")


def ops_in_a_row(theta, x, seeds, scales):
    layout = LAYOUTS["12-8-r1"]
    factors = kernels.tt_factors(theta, layout, seeds, scales, backend="triton")
    l1, r1, b1, *_ = layout.split_factors(factors)
    y = kernels.tt_adapter(x, factors, layout, act="tanh", backend="triton")
    wide = kernels.low_rank_linear(y, x, l1, l1.mT, scale=0.5, backend="triton")
    return kernels.tt_linear(wide, l1, r1, b1, backend="triton")


def test_one_graph_with_the_results_of_eager():
    args = (
        torch.randn(LAYOUTS["12-8-r1"].numel),
        torch.randn(2, 3, 12),
        torch.tensor([3, -1]),
        torch.tensor([0.5, 0.0]),
    )
    compiled = torch.compile(ops_in_a_row, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), ops_in_a_row(*args))


def test_opcheck():
    layout = LAYOUTS["12-8-r1"]
    x, factors = adapter_inputs(layout, 2, 3, torch.float32)
    seeds, scales, code = torch.tensor([3, -1]), torch.tensor([0.5, 0.0]), layout.encode()
    ops = torch.ops.adazeta
    theta = torch.randn(layout.numel)
    torch.library.opcheck(ops.tt_factors.default, (theta, code, seeds, scales, 3, None, "gaussian", "triton"))
    torch.library.opcheck(ops.tt_adapter.default, (x, factors, code, "gelu", 0.5, "triton"))
    l1, r1, b1, *_ = layout.split_factors(factors)
    torch.library.opcheck(ops.tt_linear.default, (x, l1, r1, b1, "triton"))
    torch.library.opcheck(ops.low_rank_linear.default, (x, x, l1, l1.mT, 0.5, "triton"))
