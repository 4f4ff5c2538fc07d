"""fill_normal_, perturb_ and perturb_rows of the Triton backend on a GPU: `pytest -m gpu tests/kernels`.

All give the bits of the native CPU kernels, under every configuration that tuning may choose. Streams, graph capture
and tuning are tested here because nothing but a GPU has them. ADAZETA_GPU_ELEMENTS sets the size of the large
comparison.
"""

import os

import pytest
import torch
from kernel_cases import DISTRIBUTIONS, DTYPES, bits, lists_here_and_on_gpu

from adazeta_kernels import explain, fill_normal_, perturb_
from adazeta_kernels.backends import native
from adazeta_kernels.backends import triton as backend

ELEMENTS = int(os.environ.get("ADAZETA_GPU_ELEMENTS", 10**7))


def why_not():
    return "torch sees no GPU" if not torch.cuda.is_available() else native.unavailable() or backend.unavailable()


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=f"needs a GPU: {why_not()}")]


@pytest.fixture(autouse=True)
def _without_tuning(monkeypatch):
    """Tests that do not ask for it measure nothing."""
    monkeypatch.setenv("ADAZETA_AUTOTUNE", "0")


def configurations(dtype):
    """All that tuning may choose here; dtype is a torch dtype or None for a list of several."""
    from adazeta_kernels.backends.triton import elementwise, perturb

    code = perturb.MIXED.value if dtype is None else elementwise.DTYPES[dtype]
    return elementwise.candidates(code, torch.device("cuda", 0), 1)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fill_normal_gives_the_bits_of_the_cpu(dtype, distribution):
    for numel, offset in ((1, 3), (4099, 0), (70_001, 2**32 - 77), (300, 2**63 - 300), (4096, 8)):
        want = torch.empty(numel, dtype=dtype)
        native.fill_normal_(want, 2**64 - 3, offset, distribution)
        for configuration in configurations(dtype):
            got = torch.full((numel + 2,), 3.0, dtype=dtype, device="cuda")
            backend.fill_normal_(got[1:-1], 2**64 - 3, offset, distribution, configuration=configuration)
            assert torch.equal(bits(got[1:-1]), bits(want)), (numel, offset, configuration)
            assert got[0] == got[-1] == 3, "wrote outside of the tensor"


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_elements_give_the_bits_of_the_cpu(dtype, distribution):
    """In pieces of 2^24, so that 1e9 elements need no more memory than 1e7."""
    for begin in range(0, ELEMENTS, 1 << 24):
        numel = min(1 << 24, ELEMENTS - begin)
        got = torch.empty(numel, dtype=dtype, device="cuda")
        fill_normal_(got, 7, offset=begin, distribution=distribution, backend="triton")
        want = fill_normal_(torch.empty(numel, dtype=dtype), 7, offset=begin, distribution=distribution)
        assert torch.equal(bits(got), bits(want)), begin
        for params in (got, want):
            perturb_([params], [8, 9], [0.5, -1e-3], offset=begin, decay=0.9, distribution=distribution)
        assert torch.equal(bits(got), bits(want)), begin


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtypes", [*([d] for d in DTYPES), DTYPES], ids=["float32", "bfloat16", "float16", "mixed"])
def test_perturb_of_lists_gives_the_bits_of_the_cpu(dtypes, distribution):
    dtype = dtypes[0] if len(dtypes) == 1 else None
    for count, offset, decay, seeds in ((1, 0, 1.0, 1), (12, 2**34 - 1501, 0.9, 3), (300, 2**32 + 5, 0.99, 70)):
        scales = torch.tensor([0.01 * (j - 1) for j in range(seeds)])
        for configuration in configurations(dtype):
            here, there = lists_here_and_on_gpu(count, dtypes)
            native.perturb_(here, torch.arange(seeds), scales, offset, decay, distribution)
            backend.perturb_(
                there, torch.arange(seeds), scales, offset, decay, distribution, configuration=configuration
            )
            assert all(torch.equal(bits(h), bits(t)) for h, t in zip(here, there)), (count, configuration)


def test_perturb_of_special_values_gives_the_bits_of_the_cpu():
    values = [0.0, -0.0, 1e-40, -1e-45, float("inf"), 6e4, 65519.0, 65520.0, 3e38, 5.9e-8, 2.9e-8, 1.0]
    for dtype in DTYPES:
        for scale, decay in ((0.0, 1.0), (1e-8, 1.0), (-1.0, 1.0), (1.0, -0.5)):
            here = torch.tensor(values).to(dtype)
            there = here.cuda()
            perturb_([here], [1], [scale], decay=decay, distribution="rademacher", backend="native")
            perturb_([there], [1], [scale], decay=decay, distribution="rademacher", backend="triton")
            assert torch.equal(bits(here), bits(there)), (dtype, scale, decay)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_perturb_rows_gives_the_bits_of_the_cpu(distribution):
    for numel, rows in ((6361, 300), (8192, 7), (1, 70_000)):
        theta, seeds, scales = torch.randn(numel), torch.arange(rows) - 5, torch.randn(rows)
        scales[::3] = 0.0
        want = native.perturb_rows(theta, seeds, scales, 2**33 - 9, distribution)
        got = backend.perturb_rows(theta.cuda(), seeds, scales, 2**33 - 9, distribution)
        assert torch.equal(bits(got), bits(want))


def test_launches_go_to_the_current_stream():
    """A long job on the side stream is still running when the call returns, and the call waits for it there."""
    side, theta = torch.cuda.Stream(), torch.zeros(1000, device="cuda")
    perturb_([theta.clone()], [3], [0.5], backend="triton")  # compiled
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        theta.fill_(1.0)
        perturb_([theta], [3], [0.5], backend="triton")
        assert not side.query()  # neither the sleep nor the call made the host wait
    side.synchronize()
    want = torch.ones(1000)
    perturb_([want], [3], [0.5])
    assert torch.equal(bits(theta), bits(want))


@pytest.mark.parametrize("count", [1, 200])
def test_capture_in_a_cuda_graph(count):
    """A replay reads no host memory: what the call was given is gone by then."""
    _, params = lists_here_and_on_gpu(count)
    before = [p.clone() for p in params]

    def step():
        perturb_(params, [3, 4], [0.5, -0.25], decay=0.5, backend="triton")
        rows = backend.perturb_rows(params[0].float(), torch.tensor([1, 2]), torch.tensor([0.1, -0.1]), 0, "gaussian")
        return fill_normal_(torch.empty(5000, device="cuda"), 9, backend="triton"), rows

    eager, moved = step(), [p.clone() for p in params]
    for param, value in zip(params, before):
        param.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    assert all(torch.equal(bits(p), bits(b)) for p, b in zip(params, before))  # capturing runs nothing
    graph.replay()
    assert all(torch.equal(bits(p), bits(m)) for p, m in zip(params, moved))
    assert all(torch.equal(bits(c), bits(e)) for c, e in zip(captured, eager))


def test_tuning_measures_once_and_changes_no_bit(monkeypatch, tmp_path):
    from adazeta_kernels.backends.triton import tuning

    monkeypatch.setenv("ADAZETA_CACHE", str(tmp_path))
    monkeypatch.delenv("ADAZETA_AUTOTUNE")
    for cached in (tuning._path, tuning._chosen):
        cached.cache_clear()
    there, here = torch.randn(100_000, device="cuda").bfloat16(), None
    here = there.cpu()
    for _ in range(2):
        perturb_([there], [1], [0.5], backend="triton")
        perturb_([here], [1], [0.5], backend="native")
    assert torch.equal(bits(there), bits(here))
    (file,) = tmp_path.iterdir()
    print(file.name, file.read_text())
    assert "131072x1" in file.read_text()
    for cached in (tuning._path, tuning._chosen):
        cached.cache_clear()


def test_the_current_device_stays():
    device = torch.cuda.device_count() - 1
    theta = torch.zeros(5, device=f"cuda:{device}")
    perturb_([theta], [1], [1.0], backend="triton")
    assert torch.cuda.current_device() == 0
    want = torch.zeros(5)
    perturb_([want], [1], [1.0])
    assert torch.equal(bits(theta), bits(want))


def test_explain_on_a_gpu():
    theta = torch.zeros(5, device="cuda")
    print(explain("perturb_", [theta], [1], [1.0]))
    assert explain("perturb_", [theta], [1], [1.0], backend="triton").backend == "triton"
