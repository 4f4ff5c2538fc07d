"""What needs a CUDA GPU: `pytest -m gpu tests/kernels`, or scripts/gpu_session.sh, which adds the sanitizers.

RNG ops give the bits of the native CPU kernels; the TT ops hold the error of plain torch to float64. Streams and graph
capture are tested here because nothing but a GPU has them. ADAZETA_GPU_ELEMENTS sets the size of the large comparison.
"""

import os

import pytest
import torch

from adazeta_kernels import (
    TTAdapterLayout,
    checks,
    fill_normal_,
    low_rank_linear,
    perturb_,
    tt_adapter,
    tt_factors,
    tt_linear,
)
from adazeta_kernels.backends import native, native_cuda, reference
from adazeta_kernels.testing import assert_as_exact_as

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DISTRIBUTIONS = ["gaussian", "rademacher"]
ELEMENTS = int(os.environ.get("ADAZETA_GPU_ELEMENTS", 10**7))
LAYOUT = TTAdapterLayout.auto(576, 64, 5)


def why_not():
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    return native.unavailable() or native_cuda.unavailable()


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=f"needs a GPU: {why_not()}")]


def bits(tensor):
    return tensor.cpu().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def lists(count, seed=0):
    """Tensors of 0 to 3,000 elements of mixed dtypes, each on the CPU and on the GPU, some misaligned."""
    generator = torch.Generator().manual_seed(seed)
    here, there = [], []
    for position in range(count):
        numel = int(torch.randint(0, 3000 if position % 3 == 0 else 40, (), generator=generator))
        tensor = torch.randn(numel, generator=generator).to(DTYPES[position % 3])
        shifted = torch.empty(numel + 8, dtype=tensor.dtype, device="cuda")[position % 5 :][:numel]
        here.append(tensor)
        there.append(shifted.copy_(tensor))
    return here, there


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
        here, there = lists(count)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (40, 1), (3, 13), (2, 0), (2, 5000)], ids=str)
def test_tt_adapter(shape, dtype):
    theta = torch.randn(LAYOUT.numel, device="cuda") * 0.4
    factors = tt_factors(theta, LAYOUT, list(range(shape[0])), [0.1] * shape[0], backend="native")
    x = torch.randn(*shape, LAYOUT.width, device="cuda").to(dtype)
    for act in checks.ACTS:
        y = tt_adapter(x, factors, LAYOUT, act=act, scale=-0.7, backend="native")
        oracle = reference.tt_adapter(x.double(), factors.double(), LAYOUT, act, -0.7)
        assert_as_exact_as(y, reference.tt_adapter(x, factors, LAYOUT, act, -0.7), oracle)


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


def test_the_current_device_stays():
    device = torch.cuda.device_count() - 1
    theta = torch.zeros(5, device=f"cuda:{device}")
    perturb_([theta], [1], [1.0], backend="native")
    assert torch.cuda.current_device() == 0
    want = torch.zeros(5)
    perturb_([want], [1], [1.0])
    assert torch.equal(bits(theta), bits(want))
