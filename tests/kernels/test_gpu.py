"""What needs a CUDA GPU: `pytest -m gpu tests/kernels`, or scripts/gpu_session.sh, which adds the sanitizers.

RNG ops give the bits of the native CPU kernels; the TT ops hold the error of plain torch to float64. Streams and graph
capture are tested here because nothing but a GPU has them. ADAZETA_GPU_ELEMENTS sets the size of the large comparison.
"""

import os

import pytest
import torch
from kernel_cases import DISTRIBUTIONS, DTYPES, bits, lists_here_and_on_gpu

from adazeta_kernels import (
    TTAdapterLayout,
    checks,
    dispatch,
    fill_normal_,
    low_rank_linear,
    perturb_,
    tt_adapter,
    tt_factors,
    tt_linear,
)
from adazeta_kernels.backends import native, native_cuda, reference
from adazeta_kernels.testing import assert_as_exact_as

ELEMENTS = int(os.environ.get("ADAZETA_GPU_ELEMENTS", 10**7))
LAYOUT = TTAdapterLayout.auto(576, 64, 5)


def why_not():
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    return native.unavailable() or native_cuda.unavailable()


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=f"needs a GPU: {why_not()}")]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fill_normal_gives_the_bits_of_the_cpu(dtype, distribution):
    for numel, offset in ((1, 3), (4099, 0), (70_001, 2**32 - 77), (300, 2**63 - 300)):
        got = fill_normal_(
            torch.empty(numel, dtype=dtype, device="cuda"),
            2**64 - 3,
            offset=offset,
            distribution=distribution,
            backend="native",
        )
        want = fill_normal_(torch.empty(numel, dtype=dtype), 2**64 - 3, offset=offset, distribution=distribution)
        assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_many_elements_give_the_bits_of_the_cpu(distribution):
    """In pieces of 2^24, so that 1e9 elements need no more memory than 1e7."""
    for begin in range(0, ELEMENTS, 1 << 24):
        numel = min(1 << 24, ELEMENTS - begin)
        got = fill_normal_(torch.empty(numel, device="cuda"), 7, offset=begin, distribution=distribution)
        want = fill_normal_(torch.empty(numel), 7, offset=begin, distribution=distribution)
        assert torch.equal(bits(got), bits(want)), begin


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("count", [1, 12, 112, 300])
def test_perturb_gives_the_bits_of_the_cpu(count, distribution):
    for offset, decay, seeds in ((0, 1.0, 1), (2**34 - 1501, 0.9, 3), (1, 0.5, 0), (2**32 + 5, 0.99, 70)):
        here, there = lists_here_and_on_gpu(count)
        scales = [0.01 * (j - 1) for j in range(seeds)]
        for params in (here, there):
            perturb_(
                params,
                list(range(seeds)),
                scales,
                offset=offset,
                decay=decay,
                distribution=distribution,
                backend="native",
            )
        assert all(torch.equal(bits(h), bits(t)) for h, t in zip(here, there))


def test_perturb_of_special_values_gives_the_bits_of_the_cpu():
    values = [0.0, -0.0, 1e-40, -1e-45, float("inf"), 6e4, 65519.0, 65520.0, 3e38, 5.9e-8, 2.9e-8, 1.0]
    for dtype in DTYPES:
        for scale in (0.0, 1e-8, -1.0):
            here = torch.tensor(values).to(dtype)
            there = here.cuda()
            for params in (here, there):
                perturb_([params], [1], [scale], distribution="rademacher", backend="native")
            assert torch.equal(bits(here), bits(there))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_perturb_rows_gives_the_bits_of_the_cpu(distribution):
    theta, seeds, scales = torch.randn(6361), torch.arange(300) - 5, torch.randn(300)
    got = native.perturb_rows(theta.cuda(), seeds, scales, 2**33 - 9, distribution)
    assert torch.equal(bits(got), bits(native.perturb_rows(theta, seeds, scales, 2**33 - 9, distribution)))


@pytest.mark.parametrize("rank", [2, 5, 16])
def test_tt_factors(rank):
    layout = TTAdapterLayout.auto(4096, 64, rank)  # rank 16 needs more than a block's shared memory
    theta, seeds, scales = torch.randn(layout.numel) * 0.4, [1, 2, 3], [0.0, 1e-3, -0.1]
    got = tt_factors(theta.cuda(), layout, seeds, scales, backend="native")
    want = tt_factors(theta, layout, seeds, scales, backend="native")
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("rank", [5, 16])
def test_tt_factors_of_many_adapters_have_the_bits_of_single_calls(rank):
    layout = TTAdapterLayout.auto(4096, 64, rank)
    theta, seeds, scales = torch.randn(3 * layout.numel, device="cuda"), list(range(260)), [1e-3] * 260
    got = tt_factors(theta, layout, seeds, scales, offset=41, adapters=3, backend="native")
    for adapter, part in enumerate(theta.split(layout.numel)):
        one = tt_factors(part, layout, seeds, scales, offset=41 + adapter * layout.numel, backend="native")
        assert torch.equal(got[adapter], one)


WIDE = TTAdapterLayout.auto(4096, 64, 5)


def adapter_error(layout, shape, dtype, misaligned=0):
    """Hold tt_adapter to the error of plain torch, x starting `misaligned` elements behind a 16-byte boundary."""
    theta = torch.randn(layout.numel, device="cuda") * 0.4
    factors = tt_factors(theta, layout, list(range(shape[0])), [0.1] * shape[0], backend="native")
    x = torch.randn(shape[0] * shape[1] * layout.width + 8, device="cuda").to(dtype)
    x = x[misaligned:][: shape[0] * shape[1] * layout.width].view(*shape, layout.width)
    for act in checks.ACTS:
        y = tt_adapter(x, factors, layout, act=act, scale=-0.7, backend="native")
        oracle = reference.tt_adapter(x.double(), factors.double(), layout, act, -0.7)
        assert_as_exact_as(y, reference.tt_adapter(x, factors, layout, act, -0.7), oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (40, 1), (3, 13), (2, 0), (2, 5000)], ids=str)
def test_tt_adapter(shape, dtype):
    adapter_error(LAYOUT, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (40, 1), (3, 7), (2, 1500)], ids=str)
def test_tt_adapter_of_width_4096(shape, dtype):
    """Few tokens are split over d."""
    adapter_error(WIDE, shape, dtype)


@pytest.mark.parametrize("bottleneck", [720, 1024])
def test_tt_adapter_of_wide_bottlenecks(bottleneck):
    """A tile's bottleneck beside the kernel's own arrays is more than the shared memory that a block gets unasked."""
    layout = TTAdapterLayout.auto(1200, bottleneck, 2)
    adapter_error(layout, (2, 1500), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_views(dtype):
    for shape in ((1, 1), (2, 1500)):
        adapter_error(WIDE, shape, dtype, misaligned=1)


def test_a_split_call_gives_the_same_bits_every_time():
    factors = torch.randn(1, WIDE.factor_numel, device="cuda")
    x = torch.randn(1, 1, 4096, device="cuda")
    first = tt_adapter(x, factors, WIDE, backend="native")
    assert all(torch.equal(first, tt_adapter(x, factors, WIDE, backend="native")) for _ in range(100))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (300, 3), (3, 700)], ids=str)
def test_tt_adapter_from_cores(shape, dtype):
    theta, x = torch.randn(WIDE.numel) * 0.4, torch.randn(*shape, WIDE.width, device="cuda").to(dtype)
    seeds, scales = torch.arange(shape[0]) - 2, torch.full((shape[0],), 0.1)
    y = native_cuda.tt_adapter_from_cores(x, theta.cuda(), WIDE, seeds, scales, 2**33 + 3, "gaussian", "gelu", -0.7)
    factors = native.tt_factors(theta, WIDE, seeds, scales, 2**33 + 3, "gaussian")[0].cuda()
    oracle = reference.tt_adapter(x.double(), factors.double(), WIDE, "gelu", -0.7)
    assert_as_exact_as(y, reference.tt_adapter(x, factors, WIDE, "gelu", -0.7), oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank(dtype):
    for probes, tokens, d_in, rank, d_out in ((1, 1, 8, 1, 8), (3, 300, 100, 5, 37), (2, 90, 2500, 12, 64)):
        x = torch.randn(probes, tokens, d_in, device="cuda").to(dtype)
        base = torch.randn(probes, tokens, d_out, device="cuda").to(dtype)
        left, right = torch.randn(probes, d_in, rank, device="cuda"), torch.randn(probes, rank, d_out, device="cuda")
        product = x.double() @ left.double() @ right.double()
        y = tt_linear(x, left, right, backend="native")
        assert_as_exact_as(y, reference.tt_linear(x, left, right, None), product)
        y = low_rank_linear(x, base, left, right, scale=0.3, backend="native")
        plain = reference.low_rank_linear(x, base, left, right, 0.3)
        assert_as_exact_as(y, plain, base.double() + 0.3 * product)


def test_launches_go_to_the_current_stream():
    """A long job on the side stream is still running when the call returns, and the call waits for it there."""
    side, theta = torch.cuda.Stream(), torch.zeros(1000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        theta.fill_(1.0)
        perturb_([theta], [3], [0.5], backend="native")
        assert not side.query()  # neither the sleep nor the call made the host wait
    side.synchronize()
    want = torch.ones(1000)
    perturb_([want], [3], [0.5])
    assert torch.equal(bits(theta), bits(want))


def test_capture_in_a_cuda_graph():
    theta = torch.randn(LAYOUT.numel, device="cuda")
    x = torch.randn(2, 3, LAYOUT.width, device="cuda")
    before = theta.clone()

    def step():
        perturb_([theta], [3, 4], [0.5, -0.25], decay=0.5, backend="native")
        factors = tt_factors(theta, LAYOUT, [1, 2], [0.1, -0.1], backend="native")
        return tt_adapter(x, factors, LAYOUT, backend="native")

    eager = step()
    theta.copy_(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    assert torch.equal(theta, before)  # capturing runs nothing
    graph.replay()
    assert torch.equal(captured, eager)


def test_a_list_too_long_to_capture_says_so():
    params = [torch.zeros(3, device="cuda") for _ in range(200)]
    with pytest.raises(RuntimeError, match="200 tensors and 1 seeds cannot be captured"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            perturb_(params, [1], [1.0], backend="native")


def test_bad_input_is_named_before_anything_is_written():
    here, there = torch.zeros(5), torch.zeros(5, device="cuda")
    with pytest.raises(ValueError, match="tensor 1 of shape .* is on cuda:0, expected cpu"):
        perturb_([here, there], [1], [1.0])
    with pytest.raises(ValueError, match="tensors 0 and 1 share memory"):
        perturb_([there[:3], there[2:]], [1], [1.0], backend="native")
    with pytest.raises(ValueError, match="a scale must be finite, got inf"):
        perturb_([there], [1], [float("inf")], backend="native")
    with pytest.raises(ValueError, match="seeds must be on the CPU, got cuda:0"):
        perturb_([there], torch.tensor([1], device="cuda"), torch.ones(1), backend="native")
    gone = torch.zeros(5, device="cuda")
    gone.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="the memory of tensor 0 of shape .* was freed"):
        perturb_([gone], [1], [1.0], backend="native")
    with pytest.raises(ValueError, match="factors is on cpu, expected cuda:0 as x"):
        tt_adapter(torch.zeros(1, 1, 576, device="cuda"), torch.zeros(1, LAYOUT.factor_numel), LAYOUT)
    assert not here.any() and not there.any()


def test_beyond_a_limit_another_backend_runs_or_the_call_names_the_reason(caplog):
    x = torch.randn(2, 3, 80, device="cuda")
    left, right = torch.randn(2, 80, 65, device="cuda"), torch.randn(2, 65, 70, device="cuda")
    dispatch.clear()
    with caplog.at_level("INFO", logger="adazeta_kernels"):
        y = tt_linear(x, left, right)
    assert "native cannot run tt_linear: rank 65 is above the native kernel's limit of 64" in caplog.text
    exact = x.double() @ left.double() @ right.double()
    assert_as_exact_as(y, reference.tt_linear(x, left, right, None), exact)
    with pytest.raises(RuntimeError, match="rank 65 is above the native kernel's limit of 64"):
        tt_linear(x, left, right, backend="native")
    wide = TTAdapterLayout.auto(1200, 1040, 2)
    with pytest.raises(RuntimeError, match="bottleneck 1040 is above the native kernel's limit of 1024"):
        tt_adapter(
            torch.zeros(1, 2, 1200, device="cuda"),
            torch.zeros(1, wide.factor_numel, device="cuda"),
            wide,
            backend="native",
        )


def test_the_current_device_stays():
    device = torch.cuda.device_count() - 1
    theta = torch.zeros(5, device=f"cuda:{device}")
    perturb_([theta], [1], [1.0], backend="native")
    assert torch.cuda.current_device() == 0
    want = torch.zeros(5)
    perturb_([want], [1], [1.0])
    assert torch.equal(bits(theta), bits(want))
