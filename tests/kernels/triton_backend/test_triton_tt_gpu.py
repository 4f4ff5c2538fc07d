"""The TT ops of the Triton backend on a GPU: `pytest -m gpu tests/kernels`.

Held to float64 at the error of plain torch, as everywhere, and to native CUDA, under every configuration that tuning
may choose; with several programs a tile, and captured in a CUDA graph.
"""

import pytest
import torch
from kernel_cases import DEEP, DTYPES, adapter_inputs, low_rank_inputs

from adazeta_kernels import TTAdapterLayout, checks, tt_adapter, tt_factors
from adazeta_kernels.backends import native, native_cuda, reference
from adazeta_kernels.backends import triton as backend
from adazeta_kernels.testing import assert_as_exact_as

LAYOUTS = {
    "576-64-r5": TTAdapterLayout.auto(576, 64, 5),
    "4096-64-r5": TTAdapterLayout.auto(4096, 64, 5),
    "4096-64-r16": TTAdapterLayout.auto(4096, 64, 16),
    "77-6-r4-nobias": TTAdapterLayout.auto(77, 6, 4, bias=False),
    "130-70-r64": TTAdapterLayout.auto(130, 70, 64, shapes={"width": (10, 13), "bottleneck": (7, 10)}),
    "16-cores": DEEP,
}
# The fewest tokens, a tile and one token more, more tiles than processors.
SHAPES = [(1, 1), (40, 1), (3, 65), (2, 5000)]


def why_not():
    return "torch sees no GPU" if not torch.cuda.is_available() else native.unavailable() or backend.unavailable()


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=f"needs a GPU: {why_not()}")]


@pytest.fixture(autouse=True)
def _without_tuning(monkeypatch):
    """Tests that do not ask for it measure nothing."""
    monkeypatch.setenv("ADAZETA_AUTOTUNE", "0")


@pytest.fixture(params=LAYOUTS, ids=list(LAYOUTS))
def layout(request):
    return LAYOUTS[request.param]


def token_configurations(rank, width, dtype):
    from adazeta_kernels.backends.triton import launch, token_launch

    limits = launch.limits(torch.device("cuda", 0))
    return token_launch.fitting(token_launch.padded(rank), dtype.itemsize, width, limits, width % 16 != 0)


def assert_adapter(x, factors, layout, act, **forced):
    y = backend.tt_adapter(x, factors, layout, act, -0.7, **forced)
    exact = reference.apply_adapter(x.double(), factors.double(), layout, act, -0.7)
    assert_as_exact_as(y, reference.tt_adapter(x, factors, layout, act, -0.7), exact)
    return y


@pytest.mark.parametrize("distribution", checks.DISTRIBUTIONS)
def test_tt_factors(layout, distribution):
    from adazeta_kernels.backends.triton import launch, token_launch, tt_plan
    from adazeta_kernels.backends.triton.tt_factors import candidates

    theta = torch.randn(3 * layout.numel, device="cuda") * 0.3
    seeds, scales, offset = torch.arange(5) - 2, torch.tensor([0.0, 1e-3, -0.5, 1.0, 1e-3]), 2**33 + 5
    rows = native_cuda.perturb_rows(theta, seeds, scales, offset, distribution).split(layout.numel, dim=1)
    plain, exact = (
        torch.stack([reference.contract_cores(r.contiguous().to(t), layout) for r in rows])
        for t in (torch.float32, torch.float64)
    )
    rank = token_launch.padded(tt_plan.plan(layout).rank)
    for configuration in candidates(rank, launch.limits(theta.device)):
        for shares in (1, 3):
            got = backend.tt_factors(
                theta,
                layout,
                seeds,
                scales,
                offset,
                distribution,
                configuration=configuration,
                shares=shares,
            )
            for a in range(3):
                blocks = (layout.split_factors(f[a]) for f in (got, plain, exact))
                for position, (x, y, z) in enumerate(zip(*blocks, strict=True)):
                    if position in (2, 5):
                        assert (x is None and y is None) or torch.equal(x, y)
                    else:
                        assert_as_exact_as(x, y, z)
    if layout.max_bond <= 64:
        other = native_cuda.tt_factors(theta, layout, seeds, scales, offset, distribution)
        torch.testing.assert_close(got, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tt_adapter(layout, shape, dtype):
    if shape[1] == 5000 and layout.width > 1000:
        shape = (2, 1500)
    x, factors = adapter_inputs(layout, *shape, dtype, "cuda")
    for configuration in token_configurations(layout.max_bond, layout.width, dtype):
        assert_adapter(x, factors, layout, "gelu", configuration=configuration, shares=1)
    y = assert_adapter(x, factors, layout, "silu")
    assert torch.equal(y, backend.tt_adapter(x, factors, layout, "silu", -0.7)), "two runs differ"
    other = native_cuda.tt_adapter(x, factors, layout, "silu", -0.7)
    eps = 64 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert (y - other).abs().max() <= eps * other.abs().max()


@pytest.mark.parametrize("act", checks.ACTS)
@pytest.mark.parametrize("shares", [1, 2, 16])
def test_activations_and_shares(act, shares):
    for dtype in DTYPES:
        x, factors = adapter_inputs(LAYOUTS["4096-64-r5"], 2, 19, dtype, "cuda")
        few = token_configurations(5, 4096, dtype)[-1]
        assert_adapter(x, factors, LAYOUTS["4096-64-r5"], act, configuration=few, shares=shares)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank(dtype):
    for probes, tokens, d_in, rank, d_out in (
        (1, 1, 16, 1, 8),
        (3, 300, 100, 5, 37),
        (2, 90, 2560, 12, 64),
        (2, 9, 512, 64, 4096),
    ):
        x, base, left, right, bias = low_rank_inputs(probes, tokens, d_in, rank, d_out, dtype, "cuda")
        product = x.double() @ left.double() @ right.double()
        y = backend.tt_linear(x, left, right, bias)
        assert_as_exact_as(y, reference.tt_linear(x, left, right, bias), product + bias.double()[:, None])
        y = backend.low_rank_linear(x, base, left, right, 0.3)
        assert_as_exact_as(y, reference.low_rank_linear(x, base, left, right, 0.3), base.double() + 0.3 * product)


def test_capture_in_a_cuda_graph():
    """Seeds and scales are those of the capture; theta and x are read anew by every replay."""
    layout = LAYOUTS["576-64-r5"]
    theta, x = torch.randn(2 * layout.numel, device="cuda"), torch.randn(2, 3, layout.width, device="cuda")

    def step():
        factors = tt_factors(theta, layout, [1, 2], [0.1, -0.1], adapters=2, backend="triton")
        return tt_adapter(tt_adapter(x, factors[0], layout, backend="triton"), factors[1], layout, backend="triton")

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    theta.mul_(0.5)
    x.add_(1.0)
    graph.replay()
    assert torch.equal(captured, step())
    graph.replay()
    assert torch.equal(captured, step())


def test_tuned_calls_give_the_results_of_others(monkeypatch, tmp_path):
    from adazeta_kernels.backends.triton import tuning

    layout = LAYOUTS["576-64-r5"]
    x, factors = adapter_inputs(layout, 4, 1000, torch.bfloat16, "cuda")
    expected = backend.tt_adapter(x, factors, layout, "relu", 1.0)
    monkeypatch.setenv("ADAZETA_AUTOTUNE", "1")
    monkeypatch.setenv("ADAZETA_CACHE", str(tmp_path))
    tuning._path.cache_clear()
    y = backend.tt_adapter(x, factors, layout, "relu", 1.0)
    tuning._path.cache_clear()
    assert any("tt_adapter" in path.read_text() for path in tmp_path.iterdir())
    # Another tile may take another matrix instruction, which sums in another order.
    assert (y - expected).abs().max() <= torch.finfo(x.dtype).eps * expected.abs().max()
