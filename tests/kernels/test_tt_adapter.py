"""tt_adapter against dense float64 matrices: dtypes, activations, odd shapes, one probe, one token, no token."""

import pytest
import torch

from adazeta_kernels import TTAdapterLayout, perturb_, tt_adapter, tt_factors
from adazeta_kernels.checks import ACTS
from adazeta_kernels.testing import assert_as_exact_as, dense_adapter

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (1, 7), (5, 1), (3, 13), (2, 0), (33, 2), (1, 700), (4, 150)]
LAYOUT = TTAdapterLayout.auto(576, 64, 5)
SCALES = [0.0, 1e-3, -0.1]


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def make(layout, probes, tokens, dtype=torch.float32):
    theta = torch.randn(layout.numel) * 0.4
    seeds = list(range(100, 100 + probes))
    scales = [SCALES[p % 3] for p in range(probes)]
    x = torch.randn(probes, tokens, layout.width).to(dtype)
    return x, theta, seeds, scales


def oracle(x, theta, seeds, scales, layout, act, scale):
    rows = []
    for p, (seed, eps) in enumerate(zip(seeds, scales, strict=True)):
        moved = theta.clone()
        perturb_([moved], [seed], [eps])
        rows.append(dense_adapter(x[p], moved, layout, act, scale))
    return torch.stack(rows)


def plain(x, factors, layout, act, scale):
    """The textbook lines in plain torch at the dtype of x, one probe after another."""
    functions = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}
    functions |= {"tanh": torch.tanh, "identity": lambda h: h}
    rows = []
    for p, x_p in enumerate(x):
        parts = layout.split_factors(factors.to(x.dtype)[p : p + 1])
        l1, r1, b1, l2, r2, b2 = (0 if t is None else t[0] for t in parts)
        rows.append(x_p + scale * (functions[act](x_p @ l1 @ r1 + b1) @ l2 @ r2 + b2))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"P{s[0]}-T{s[1]}")
def test_shapes_and_dtypes(shape, dtype):
    x, theta, seeds, scales = make(LAYOUT, *shape, dtype)
    before = x.clone()
    factors = tt_factors(theta.double() if dtype == torch.float64 else theta, LAYOUT, seeds, scales)
    y = tt_adapter(x, factors, LAYOUT, scale=0.7)
    assert y.shape == x.shape and y.dtype == dtype and y.is_contiguous()
    assert torch.equal(x, before)
    if shape[1]:
        expected = oracle(x, theta, seeds, scales, LAYOUT, "relu", 0.7)
        if dtype == torch.float64:  # perturb_ rounds theta to float32, float64 theta is not rounded
            assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()
        else:
            assert_as_exact_as(y, plain(x, factors, LAYOUT, "relu", 0.7), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("scale", [1.0, -2.5, 0.0])
def test_activations(act, bias, scale, dtype):
    layout = TTAdapterLayout.auto(120, 24, (2, 3, 4, 3, 2), bias=bias)
    x, theta, seeds, _ = make(layout, 3, 5, dtype)
    scales = [0.0] * 3  # so that the oracle has the same theta at every dtype
    factors = tt_factors(theta.double() if dtype == torch.float64 else theta, layout, seeds, scales)
    y = tt_adapter(x, factors, layout, act=act, scale=scale)
    expected = oracle(x, theta, seeds, scales, layout, act, scale)
    assert_as_exact_as(y, plain(x, factors, layout, act, scale), expected)
    if scale == 0.0:
        assert torch.equal(y, x)


@pytest.mark.parametrize("width", [12, 77, 896, 1024])
def test_other_widths(width):
    layout = TTAdapterLayout.auto(width, 8 if width < 100 else 64, 4)
    x, theta, seeds, scales = make(layout, 3, 6)
    factors = tt_factors(theta, layout, seeds, scales)
    y = tt_adapter(x, factors, layout, act="silu")
    expected = oracle(x, theta, seeds, scales, layout, "silu", 1.0)
    assert_as_exact_as(y, plain(x, factors, layout, "silu", 1.0), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("tokens", [1, 3, 500])
def test_batched_is_one_by_one(tokens, dtype):
    x, theta, seeds, scales = make(LAYOUT, 6, tokens, dtype)
    factors = tt_factors(theta, LAYOUT, seeds, scales)
    together = tt_adapter(x, factors, LAYOUT, act="gelu")
    # Products may sum 576 numbers in another order; a bfloat16 result may then round to its neighbour.
    eps = 64 * torch.finfo(torch.float32).eps if dtype == torch.float32 else torch.finfo(dtype).eps
    for p in range(6):
        alone = tt_adapter(x[p : p + 1], factors[p : p + 1], LAYOUT, act="gelu")
        assert (together[p] - alone[0]).abs().max() <= eps * alone.abs().max()
        for t in (0, tokens - 1):
            token = tt_adapter(x[p : p + 1, t : t + 1], factors[p : p + 1], LAYOUT, act="gelu")
            assert (together[p, t] - token[0, 0]).abs().max() <= eps * token.abs().max()


def test_each_probe_reads_its_own_factors():
    x, theta, _, _ = make(LAYOUT, 2, 4)
    x[1] = x[0]
    factors = tt_factors(theta, LAYOUT, [1, 2], [0.5, 0.5])
    y = tt_adapter(x, factors, LAYOUT)
    swapped = tt_adapter(x, factors.flip(0), LAYOUT)
    assert not torch.allclose(y[0], y[1])
    assert torch.equal(y[0], swapped[1]) and torch.equal(y[1], swapped[0])


def test_a_perturbation_of_1e_3_survives_bf16_activations():
    x, theta, _, _ = make(LAYOUT, 2, 16, torch.bfloat16)
    x[1] = x[0]
    factors = tt_factors(theta, LAYOUT, [5, 5], [1e-3, -1e-3])
    y = tt_adapter(x, factors, LAYOUT, act="identity", scale=100.0).double()
    wide = tt_adapter(x.double(), factors, LAYOUT, act="identity", scale=100.0)
    got, expected = (y[0] - y[1]).flatten(), (wide[0] - wide[1]).flatten()
    assert torch.nn.functional.cosine_similarity(got, expected, dim=0) > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_strided_inputs(dtype):
    x, theta, seeds, scales = make(LAYOUT, 3, 8, dtype)
    factors = tt_factors(theta, LAYOUT, seeds, scales)
    expected = tt_adapter(x, factors, LAYOUT)
    wide = torch.stack([x, -x], dim=2).flatten(1, 2)[:, ::2]  # every other token
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    padded = torch.cat([factors, factors], 1)[:, : factors.shape[1]]
    for x_in, f_in in ((wide, factors), (turned, factors), (x, padded)):
        y = tt_adapter(x_in, f_in, LAYOUT)
        assert y.is_contiguous()
        assert (y - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_factors_of_any_stride():
    x, theta, seeds, scales = make(LAYOUT, 3, 8)
    factors = tt_factors(theta, LAYOUT, seeds, scales)
    y = tt_adapter(x, factors.t().contiguous().t(), LAYOUT)
    assert torch.allclose(y, tt_adapter(x, factors, LAYOUT), rtol=1e-5, atol=1e-5)


def test_nan_stays_in_its_row():
    x, theta, seeds, scales = make(LAYOUT, 3, 4)
    factors = tt_factors(theta, LAYOUT, seeds, scales)
    clean = tt_adapter(x, factors, LAYOUT)
    x[1, 2, 3] = float("nan")
    y = tt_adapter(x, factors, LAYOUT)
    assert y[1, 2].isnan().any()
    others = torch.ones(3, 4, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_allocates_the_result_and_little_else(dtype, backend):
    x, theta, _, _ = make(LAYOUT, 32, 128, dtype)
    factors = tt_factors(theta, LAYOUT, list(range(32)), [1e-3] * 32)
    with torch.no_grad():
        tt_adapter(x, factors, LAYOUT, backend=backend)
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            y = tt_adapter(x, factors, LAYOUT, backend=backend)
    sizes = [
        event.extra_fields.alloc_size
        for event in walk(profile.profiler.kineto_results.experimental_event_tree())
        if hasattr(event.extra_fields, "alloc_size")
    ]
    allocated = sorted((s for s in sizes if s > 0), reverse=True)
    y_bytes = y.numel() * y.element_size()
    small = 32 * 128 * 64 * 4  # an intermediate of bottleneck width in fp32
    blocks = 1.25 * 2**20  # half precision is raised to fp32 in blocks of 1 MiB
    assert allocated[0] == y_bytes
    assert max(allocated[1:], default=0) <= (small if dtype == torch.float32 else blocks)
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    assert peak <= y_bytes + 2 * small + (0 if dtype == torch.float32 else 2 * blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_overwriting_is_a_permission(mode, dtype):
    with mode():
        x, theta, seeds, scales = make(LAYOUT, 3, 13, dtype)
        factors, before = tt_factors(theta, LAYOUT, seeds, scales), x.clone()
        expected = tt_adapter(x, factors, LAYOUT)
        y = tt_adapter(x, factors, LAYOUT, overwrite=True, backend="reference")
        assert torch.equal(y, tt_adapter(x, factors, LAYOUT, backend="reference")) and torch.equal(x, before)
        y = tt_adapter(x, factors, LAYOUT, overwrite=True)
        assert torch.equal(y, expected)
        assert (y.data_ptr() == x.data_ptr()) == (dtype != torch.float64)  # which has no native kernel
        strided = before.expand(2, *before.shape)[0].transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(tt_adapter(strided, factors, LAYOUT, overwrite=True), expected)
        assert torch.equal(strided, before)


def test_overwriting_is_seen_by_autograd():
    x, theta, seeds, scales = make(LAYOUT, 2, 5)
    factors = tt_factors(theta, LAYOUT, seeds, scales)
    weight = torch.ones(LAYOUT.width, requires_grad=True)
    loss = (x * weight).sum()
    tt_adapter(x, factors, LAYOUT, overwrite=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    y = tt_adapter((moving := torch.randn_like(x).requires_grad_()), factors, LAYOUT, overwrite=True)
    assert y.data_ptr() != moving.data_ptr() and y.requires_grad


def walk(events):
    """Profiler events in order of time."""
    out, stack = [], list(events)
    while stack:
        event = stack.pop()
        out.append(event)
        stack.extend(event.children)
    return sorted(out, key=lambda event: event.start_time_ns)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_gradients(bias):
    layout = TTAdapterLayout.auto(12, 8, 2, bias=bias)
    theta = (torch.randn(layout.numel, dtype=torch.float64) * 0.5).requires_grad_()
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)

    def call(x, theta):
        return tt_adapter(x, tt_factors(theta, layout, [1, 2], [0.0, 0.1]), layout, act="gelu", scale=0.5)

    assert torch.autograd.gradcheck(call, (x, theta))
    half = x.detach().bfloat16().requires_grad_()
    call(half, theta.detach().float().requires_grad_()).float().sum().backward()
    assert half.grad.dtype == torch.bfloat16 and half.grad.isfinite().all()
