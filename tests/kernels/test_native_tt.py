"""The native TT ops at every instruction set level: against float64, on ragged shapes, at any number of threads."""

import logging

import pytest
import torch
from kernel_cases import (
    DTYPES,
    LAYOUTS,
    adapter_inputs,
    alone,
    assert_activations,
    assert_infinities,
    dtype_id,
    low_rank_inputs,
)

from adazeta_kernels import TTAdapterLayout, TTShape, _native, dispatch, perturb_, tt_adapter, tt_linear
from adazeta_kernels.backends import native
from adazeta_kernels.backends.reference import tt as reference
from adazeta_kernels.checks import ACTS
from adazeta_kernels.testing import assert_as_exact_as

TOKENS = [(1, 1), (5, 3), (2, 8), (3, 9), (2, 16), (1, 33), (2, 0)]


@pytest.fixture(params=native.levels())
def level(request):
    return request.param


@pytest.fixture(params=LAYOUTS, ids=list(LAYOUTS))
def layout(request):
    return LAYOUTS[request.param]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_adapter_on_ragged_shapes(layout, level, dtype):
    for probes, tokens in TOKENS:
        x, factors = adapter_inputs(layout, probes, tokens, dtype)
        before = x.clone()
        y = native.tt_adapter(x, factors, layout, "relu", 0.7, level=level)
        assert y.shape == x.shape and y.dtype == dtype and torch.equal(x, before)
        exact = reference.apply_adapter(x.double(), factors.double(), layout, "relu", 0.7)
        assert_as_exact_as(y, reference.tt_adapter(x, factors, layout, "relu", 0.7), exact)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("tokens", [3, 20])
def test_adapter_activations(level, act, tokens):
    for layout in (LAYOUTS["576-64-r5"], LAYOUTS["unequal"]):
        x, factors = adapter_inputs(layout, 3, tokens, torch.float32)
        y = native.tt_adapter(x, factors, layout, act, 1.0, level=level)
        exact = reference.apply_adapter(x.double(), factors.double(), layout, act, 1.0)
        assert_as_exact_as(y, reference.tt_adapter(x, factors, layout, act, 1.0), exact)


def activated(act, values, rank, level):
    """act(values) through an adapter of one token: x is 0, the bias holds the values, L2 and R2 are the identity."""
    shape = TTShape((rank,), (rank,), (rank,))
    layout = TTAdapterLayout(rank, rank, shape, shape)
    bias = values.reshape(-1, rank)
    eye = torch.eye(rank).flatten().expand(len(bias), -1)
    zeros = torch.zeros(len(bias), rank * rank)
    factors = torch.cat([zeros, zeros, bias, eye, eye, torch.zeros(len(bias), rank)], 1)
    x = torch.zeros(len(bias), 1, rank)
    return native.tt_adapter(x, factors, layout, act, 1.0, level=level).flatten()


@pytest.mark.parametrize("rank", [8, 16], ids=["one-token", "tile"])
def test_activation_errors_in_units_of_rounding(level, rank):
    small = torch.logspace(-30, 0, 2048)
    x = torch.cat([torch.linspace(-20, 20, 16384), small, -small, torch.linspace(-100, 100, 4096), torch.zeros(16)])
    assert_activations(x, {act: activated(act, x, rank, level) for act in ACTS})


def test_activations_of_infinities(level):
    def activated(act, values):
        x, *adapter = alone(values)
        one, many = (native.tt_adapter(part, *adapter, act, 1.0, level=level) for part in (x[:, :1], x))
        assert torch.equal(one.expand_as(many).nan_to_num(), many.nan_to_num())
        return one.flatten()

    assert_infinities(activated)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_factors_are_those_of_the_perturbed_cores(layout, level, distribution):
    theta = torch.randn(layout.numel) * 0.3
    seeds, scales = torch.tensor([0, 7, -1]), torch.tensor([0.0, 1e-3, -0.5])
    offset = 2**33 + 5
    factors = native.tt_factors(theta, layout, seeds, scales, offset, distribution, level=level)[0]
    for probe, (seed, scale) in enumerate(zip(seeds.tolist(), scales.tolist(), strict=True)):
        moved = theta.clone()
        perturb_([moved], [seed % 2**64], [scale], offset=offset, distribution=distribution)
        alone = native.tt_factors(moved, layout, seeds[:1], scales[:1], offset, distribution, level=level)[0]
        assert torch.equal(factors[probe], alone[0])
        plain, exact = (reference.contract_cores(m[None], layout) for m in (moved, moved.double()))
        blocks = (layout.split_factors(f) for f in (alone, plain, exact))
        for a, b, c in zip(*blocks, strict=True):
            if a is not None:
                assert_as_exact_as(a, b, c)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("rank", [1, 3, 6, 8, 13, 64])
def test_low_rank_maps(level, rank, dtype):
    for probes, tokens in TOKENS:
        x, base, left, right, bias = low_rank_inputs(probes, tokens, 77, rank, 83, dtype)
        exact = [t.double() for t in (x, base, left, right, bias)]
        y = native.tt_linear(x, left, right, bias, level=level)
        expected = torch.baddbmm(exact[4][:, None], exact[0] @ exact[2], exact[3])
        assert_as_exact_as(y, reference.tt_linear(x, left, right, bias), expected)
        y = native.tt_linear(x, left, right, None, level=level)
        assert_as_exact_as(y, reference.tt_linear(x, left, right, None), exact[0] @ exact[2] @ exact[3])
        y = native.low_rank_linear(x, base, left, right, -0.3, level=level)
        expected = exact[1] - 0.3 * (exact[0] @ exact[2] @ exact[3])
        assert_as_exact_as(y, reference.low_rank_linear(x, base, left, right, -0.3), expected)


def test_factors_may_be_views():
    """What split_factors cuts goes in without a copy: rows are dense, their distance is that of all factors."""
    layout = LAYOUTS["576-64-r5"]
    x, factors = adapter_inputs(layout, 3, 40, torch.float32)
    l1, r1, b1, *_ = layout.split_factors(factors)
    dense = native.tt_linear(x, l1.contiguous(), r1.contiguous(), b1.contiguous())
    assert torch.equal(native.tt_linear(x, l1, r1, b1), dense)
    turned = l1.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(native.tt_linear(x, turned, r1, b1), dense)


@pytest.mark.parametrize("tokens", [1, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_threads_do_not_change_a_bit(level, tokens, dtype):
    layout = LAYOUTS["576-64-r5"]
    probes = 5 if tokens > 1 else 40
    x, factors = adapter_inputs(layout, probes, tokens, dtype)
    x2, base, left, right, bias = low_rank_inputs(probes, tokens, 640, 5, 1800, dtype)
    theta, seeds, scales = torch.randn(3 * layout.numel), torch.arange(probes), torch.full((probes,), 0.1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                [
                    native.tt_factors(theta, layout, seeds, scales, 3, "gaussian", level=level),
                    native.tt_adapter(x, factors, layout, "gelu", 0.5, level=level),
                    native.tt_linear(x2, left, right, bias, level=level),
                    native.low_rank_linear(x2, base, left, right, 0.5, level=level),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(40, 1), (5, 3), (5, 90), (1, 700)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_a_result_in_the_memory_of_x_has_the_same_bits(level, shape, dtype):
    layout = LAYOUTS["576-64-r5"]
    x, factors = adapter_inputs(layout, *shape, dtype)
    apart = native.tt_adapter(x, factors, layout, "gelu", 0.5, level=level)
    together = native.tt_adapter(x, factors, layout, "gelu", 0.5, overwrite=True, level=level)
    assert together is x and torch.equal(together, apart)


@pytest.mark.parametrize("tokens", [20, 3])
def test_a_token_is_the_same_anywhere_in_its_tile(level, tokens):
    layout = LAYOUTS["576-64-r5"]
    x, factors = adapter_inputs(layout, 1, tokens, torch.float32)
    y = native.tt_adapter(x, factors, layout, "silu", 1.0, level=level)
    turned = native.tt_adapter(x.flip(1), factors, layout, "silu", 1.0, level=level)
    assert torch.equal(y, turned.flip(1))


@pytest.mark.parametrize("tokens", [3, 18])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nothing_is_written_beyond_the_result(level, tokens, dtype):
    layout = LAYOUTS["77-6-r4"]
    x, factors = adapter_inputs(layout, 2, tokens, dtype)
    guarded = torch.full((x.numel() + 128,), 7.0, dtype=dtype)
    y = guarded[64:-64]
    code, threads = native._DTYPES[dtype], 1
    _native.tt_adapter(
        x.data_ptr(),
        y.data_ptr(),
        code,
        *x.shape[:2],
        layout._encoded,
        factors.data_ptr(),
        factors.stride(0),
        0,
        1.0,
        threads,
        level,
    )
    assert torch.equal(y.view_as(x), native.tt_adapter(x, factors, layout, "relu", 1.0, level=level))
    assert (guarded[:64] == 7).all() and (guarded[-64:] == 7).all()
    guarded = torch.full((6 * layout.factor_numel + 128,), 7.0)
    theta, seeds, scales = torch.randn(3 * layout.numel), torch.arange(2), torch.ones(2)
    _native.tt_factors(
        theta.data_ptr(),
        guarded[64:].data_ptr(),
        layout._encoded,
        3,
        seeds.data_ptr(),
        scales.data_ptr(),
        2,
        3,
        0,
        threads,
        level,
    )
    expected = native.tt_factors(theta, layout, seeds, scales, 3, "gaussian", level=level)
    assert torch.equal(guarded[64:-64].view_as(expected), expected)
    assert (guarded[:64] == 7).all() and (guarded[-64:] == 7).all()


def test_half_precision_keeps_infinities_and_nan(level):
    layout = LAYOUTS["12-8-r1"]
    for dtype in (torch.bfloat16, torch.float16):
        x, factors = adapter_inputs(layout, 1, 20, torch.float32)
        y = native.tt_linear(x.to(dtype), torch.full((1, 12, 1), 1e30), torch.full((1, 1, 19), 1e30), None, level=level)
        assert y.isinf().all()
        x[0, 3, 0] = float("nan")
        y = native.tt_adapter(x.to(dtype), factors, layout, "relu", 1.0, level=level)
        assert y[0, 3].isnan().any() and y[0, :3].isfinite().all() and y[0, 4:].isfinite().all()


@pytest.fixture
def fresh_dispatch(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    dispatch.clear()
    yield
    dispatch.clear()


def test_auto_is_native_for_what_it_supports(fresh_dispatch):
    cpu = torch.device("cpu")
    for op in ("tt_adapter", "tt_linear", "low_rank_linear"):
        for dtype in DTYPES:
            assert dispatch.select(op, None, cpu, dtype, rank=64) is getattr(native, op)
        assert dispatch.select(op, None, cpu, torch.float64, rank=64) is getattr(reference, op)
    assert dispatch.select("tt_factors", None, cpu, torch.float32, cores=16) is native.tt_factors


def test_beyond_a_limit_auto_falls_back_and_says_why_and_native_raises(fresh_dispatch, caplog):
    x, _, left, right, bias = low_rank_inputs(2, 3, 80, 65, 70, torch.float32)
    with caplog.at_level(logging.INFO, logger="adazeta_kernels"):
        y = tt_linear(x, left, right, bias)
    assert "native cannot run tt_linear: rank 65 is above the native kernel's limit of 64" in caplog.text
    assert torch.equal(y, reference.tt_linear(x, left, right, bias))
    with pytest.raises(RuntimeError, match="cannot run tt_linear .*: rank 65 is above the native kernel's limit of 64"):
        tt_linear(x, left, right, bias, backend="native")
    wide = TTAdapterLayout.auto(1200, 1040, 2)
    x, factors = adapter_inputs(wide, 1, 2, torch.float32)
    with pytest.raises(RuntimeError, match="bottleneck 1040 is above the native kernel's limit of 1024"):
        tt_adapter(x, factors, wide, backend="native")
    assert tt_adapter(x, factors, wide).isfinite().all()
    deep = TTShape((2,) * 12, (2,) * 5, (2,) * 16)
    layout = TTAdapterLayout(4096, 32, deep, deep.mirror)
    assert native.supports("tt_factors", device="cpu", dtype=torch.float32, cores=layout.max_cores) == (
        "cores of a map 17 is above the native kernel's limit of 16"
    )
    with pytest.raises(RuntimeError, match="a map of rank 0 has no native kernel"):
        tt_linear(torch.zeros(1, 2, 3), torch.zeros(1, 3, 0), torch.zeros(1, 0, 4), backend="native")
    with pytest.raises(RuntimeError, match="for torch.float64 on cpu"):
        tt_linear(x.double(), *(torch.zeros(1, 1200, 2), torch.zeros(1, 2, 4)), backend="native")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtype": 3}, "dtype code"),
        ({"act": 5}, "act code"),
        ({"layout": (1, 4)}, "cut short"),
        ({"layout": (1, 4, 4, 1, 1, 1, 4, 4, 65, 1, 1, 4, 4, 4)}, "rank of 1 to 64"),
        ({"layout": (1, 4, 4, 1, 9, 9)}, "at most 16 cores"),
        ({"threads": 0}, "at least 1 thread"),
        ({"level": "v9"}, "level 'v9'"),
    ],
)
def test_bad_codes_raise_before_anything_is_written(change, match):
    shape = TTShape((4,), (4,), (4,))
    layout = TTAdapterLayout(4, 4, shape, shape)
    x, y, factors = torch.zeros(1, 1, 4), torch.full((4,), 7.0), torch.zeros(1, layout.factor_numel)
    good = {"dtype": 0, "probes": 1, "tokens": 1, "layout": layout._encoded, "factors": factors.data_ptr()}
    good |= {"factor_stride": layout.factor_numel, "act": 0, "scale": 1.0, "threads": 1, "level": "auto"}
    with pytest.raises(ValueError, match=match):
        _native.tt_adapter(x=x.data_ptr(), y=y.data_ptr(), **(good | change))
    assert (y == 7).all()
