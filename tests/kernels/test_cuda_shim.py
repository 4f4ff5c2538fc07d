"""The CUDA sources, compiled as C++ and run on the CPU by tests/kernels/shim, against the native CPU kernels.

This holds the arithmetic, the indexing and the barriers of the kernels, and all code between Python and them. It tells
nothing about a GPU's memory model or speed: tests/kernels/test_gpu.py does, where there is one.
"""

import shutil
from contextlib import contextmanager

import pytest
import shim
import torch
from kernel_cases import DISTRIBUTIONS, DTYPES, LOW_RANK_SHAPES, alone, assert_infinities, bits

from adazeta_kernels import TTAdapterLayout, checks
from adazeta_kernels.backends import native, native_cuda, reference
from adazeta_kernels.testing import assert_as_exact_as

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing: it compiles the .cu files")


@pytest.fixture(scope="module")
def module():
    return shim.build(shim.ROOT / "build")


@pytest.fixture(autouse=True)
def cuda(module, monkeypatch):
    """native_cuda on CPU tensors: device 0, its default stream."""
    monkeypatch.setattr(native_cuda, "_native", module)
    monkeypatch.setattr(native_cuda, "_where", lambda tensor: (0, 0))
    return native_cuda


def misaligned(numel, dtype, by):
    """A contiguous tensor that starts `by` elements behind a 64-byte boundary, with guards on both sides."""
    whole = torch.full((numel + by + 64,), 9.0, dtype=dtype)
    return whole, whole[by : by + numel]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fill_normal(cuda, dtype, distribution):
    for numel, by, offset in ((0, 0, 5), (1, 1, 3), (4099, 0, 0), (70_001, 3, 2**32 - 77), (300, 8, 2**63 - 300)):
        whole, out = misaligned(numel, dtype, by)
        want = torch.empty(numel, dtype=dtype)
        cuda.fill_normal_(out, 2**64 - 3, offset, distribution)
        native.fill_normal_(want, 2**64 - 3, offset, distribution)
        assert torch.equal(bits(out), bits(want))
        assert (whole[:by] == 9).all() and (whole[by + numel :] == 9).all()


def lists(count, generator):
    """Tensors of 0 to 40 elements, with three long ones, of mixed dtypes and alignments."""
    for position in range(count):
        numel = 3000 + position if position in (1, 7, 8) else int(torch.randint(0, 40, (), generator=generator))
        whole, view = misaligned(numel, DTYPES[position % 3], position % 5)
        view.copy_(torch.randn(numel, generator=generator))
        yield whole, view


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("count", [1, 12, 112, 300])
def test_perturb(cuda, count, distribution):
    generator = torch.Generator().manual_seed(count)
    for offset, decay, seeds in ((0, 1.0, 1), (2**34 - 1501, 0.9, 3), (1, 0.5, 0), (2**32 + 5, 0.99, 70)):
        wholes, got = map(list, zip(*lists(count, generator)))
        guards = [whole.clone() for whole in wholes]
        want = [g.clone() for g in got]
        seeds_ = torch.randint(-(2**62), 2**62, (seeds,), generator=generator)
        scales = torch.randn(seeds, generator=generator)
        scales[1:2] = 0.0
        for module, params in ((cuda, got), (native, want)):
            module.perturb_(params, seeds_, scales, offset, decay, distribution)
        assert all(torch.equal(bits(g), bits(w)) for g, w in zip(got, want))
        for whole, guard, view in zip(wholes, guards, got):
            begin = view.storage_offset()
            guard[begin : begin + len(view)] = view
            assert torch.equal(whole, guard)


def test_a_long_list_under_another_default_device(cuda):
    """Its table is written on the CPU, whatever device torch.set_default_device names."""
    got, want = ([torch.zeros(3) for _ in range(200)] for _ in range(2))
    seeds, scales = torch.tensor([1]), torch.tensor([0.5])
    with torch.device("meta"):
        cuda.perturb_(got, seeds, scales, 0, 1.0, "gaussian")
    native.perturb_(want, seeds, scales, 0, 1.0, "gaussian")
    assert torch.equal(torch.cat(got), torch.cat(want))


def test_capture_is_looked_for_on_the_device_of_the_tensors(cuda, monkeypatch):
    current = [0]

    @contextmanager
    def device(of):
        before, current[0] = current[0], of.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    with pytest.raises(RuntimeError, match="200 tensors and 0 seeds cannot be captured"):
        cuda._device_table(torch.device("cuda", 1), ([0] * 200, [1] * 200, [0] * 200), (0, 0, 0))


def test_perturb_special_values(cuda):
    values = [0.0, -0.0, 1e-40, -1e-45, float("inf"), 6e4, 65519.0, 3e38, 5.9e-8, 1.0]
    for dtype in DTYPES:
        for scale in (0.0, 1e-3, -1.0):
            got = torch.tensor(values).to(dtype)
            want = got.clone()
            for module, params in ((cuda, got), (native, want)):
                module.perturb_([params], torch.tensor([1]), torch.tensor([scale]), 3, 1.0, "rademacher")
            assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_perturb_rows(cuda, distribution):
    for rows, numel, offset in ((1, 5, 0), (3, 6360, 2**33 - 9), (300, 33, 7)):
        theta, seeds, scales = torch.randn(numel), torch.arange(rows) * 77 - 5, torch.randn(rows)
        scales[0] = 0.0
        got = cuda.perturb_rows(theta, seeds, scales, offset, distribution)
        want = native.perturb_rows(theta, seeds, scales, offset, distribution)
        assert torch.equal(bits(got), bits(want))


def test_a_named_cause_where_no_device_can_be_used(monkeypatch, module):
    """What `unavailable` says: the driver's own words, or that there is no device."""
    assert native_cuda.unavailable() is None
    monkeypatch.setattr(module, "cuda_device_count", lambda: 0)
    assert native_cuda.unavailable() == "the driver offers no CUDA device"

    def without_driver():
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(module, "cuda_device_count", without_driver)
    assert native_cuda.unavailable() == "CUDA driver version is insufficient for CUDA runtime version"
    assert native.supports("perturb_", device="cuda", dtype=torch.float32).startswith("CUDA: CUDA driver version")
    assert native.supports("perturb_", device="cpu", dtype=torch.float32) is None


def test_the_lowest_capability_is_what_was_compiled_for(module):
    assert module.cuda_lowest_capability() == 80


def test_errors_become_exceptions(module):
    out = torch.zeros(4)
    call = {"out": out.data_ptr(), "numel": 4, "dtype": 0, "seed": 1, "offset": 0, "distribution": 0}
    with pytest.raises(RuntimeError, match=r"fill_normal_ on CUDA device 3: invalid argument \(cudaError 1\)"):
        module.cuda_fill_normal(**call, where=(3, 0))
    with pytest.raises(ValueError, match="dtype code"):
        module.cuda_fill_normal(**(call | {"dtype": 7}), where=(0, 0))
    many = ([out.data_ptr()] * 200, [1] * 200, [0] * 200)
    with pytest.raises(RuntimeError, match="invalid argument"):  # a table is needed, none is given
        module.cuda_perturb(*many, 0, 0, 0, 0, 1.0, 0, 0, (0, 0))
    assert (out == 0).all()


LAYOUTS = [
    TTAdapterLayout.auto(576, 64, 5),
    TTAdapterLayout.auto(120, 24, (2, 3, 4, 3, 2), bias=False),
    TTAdapterLayout.auto(24, 8, 7),
    # Above the shared memory of a block: device memory instead.
    TTAdapterLayout.auto(4096, 64, 16),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.width}-{layout.max_bond}")
def test_tt_factors(cuda, layout):
    theta = torch.randn(layout.numel) * 0.4
    for probes, offset, distribution in ((1, 0, "gaussian"), (5, 2**33 - 13, "rademacher")):
        seeds, scales = torch.arange(probes) - 2, torch.randn(probes)
        scales[0] = 0.0
        got = cuda.tt_factors(theta, layout, seeds, scales, offset, distribution)
        want = native.tt_factors(theta, layout, seeds, scales, offset, distribution)
        # Cores have the same bits, sums the same order; without hardware fma the CPU may round products.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


def test_the_last_layout_needs_device_memory(module):
    assert [module.cuda_tt_factors_scratch(layout._encoded, (0, 0)) > 0 for layout in LAYOUTS] == [False] * 3 + [True]


def test_tt_factors_of_many_adapters_and_probes(cuda):
    layout = TTAdapterLayout.auto(24, 8, 2)
    theta, seeds, scales = torch.randn(2 * layout.numel), torch.arange(260), torch.randn(260)
    got = cuda.tt_factors(theta, layout, seeds, scales, 41, "gaussian")
    assert got.shape == (2, 260, layout.factor_numel)
    for adapter, part in enumerate(theta.split(layout.numel)):
        one = cuda.tt_factors(part, layout, seeds, scales, 41 + adapter * layout.numel, "gaussian")
        assert torch.equal(got[adapter], one[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=lambda layout: f"{layout.width}-{layout.max_bond}")
def test_tt_adapter(cuda, layout, dtype):
    theta = torch.randn(layout.numel) * 0.4
    # Tiles of 16 tokens: whole, cut, and one that is cut within the 8 (or 4) tokens that a thread holds.
    cases = [(1, 1, 0), (5, 1, 1), (3, 13, 0), (2, 0, 0), (1, 70, 2), (2, 32, 0), (2, 25, 8), (5, 1, 0)]
    for act, (probes, tokens, by) in zip(checks.ACTS * 2, cases):
        factors = native.tt_factors(theta, layout, torch.arange(probes), torch.full((probes,), 0.1), 0, "gaussian")[0]
        _, x = misaligned(probes * tokens * layout.width, dtype, by)
        x = x.copy_(torch.randn(x.shape)).view(probes, tokens, layout.width)
        y = cuda.tt_adapter(x, factors, layout, act, -0.7)
        oracle = reference.tt_adapter(x.double(), factors.double(), layout, act, -0.7)
        assert_as_exact_as(y, reference.tt_adapter(x, factors, layout, act, -0.7), oracle)


def test_activations_of_infinities(cuda):
    assert_infinities(lambda act, values: cuda.tt_adapter(*alone(values), act, 1.0)[:, -1, 0])


def test_shared_memory_that_a_kernel_declares_counts(cuda):
    """45 KiB of a tile's bottleneck are within the 48 that a block has, but not beside the kernel's own arrays."""
    layout = TTAdapterLayout.auto(720, 720, 2)
    x, factors = torch.randn(1, 16, 720), torch.randn(1, layout.factor_numel) * 0.1
    y = cuda.tt_adapter(x, factors, layout, "relu", 1.0)
    oracle = reference.tt_adapter(x.double(), factors.double(), layout, "relu", 1.0)
    assert_as_exact_as(y, reference.tt_adapter(x, factors, layout, "relu", 1.0), oracle)


WIDE = {
    "4096-r5": TTAdapterLayout.auto(4096, 64, 5),
    "2048-r7-nobias": TTAdapterLayout.auto(2048, 24, 7, bias=False, shapes={"width": (4, 8, 64)}),
    "1200-r2": TTAdapterLayout.auto(1200, 8, 2, shapes={"width": (5, 10, 24)}),
}


def adapter_case(layout, probes, tokens, dtype):
    """x, theta, seeds, scales and the factors of a call."""
    theta, seeds, scales = torch.randn(layout.numel) * 0.4, torch.arange(probes) - 2, torch.randn(probes) * 0.1
    x = torch.randn(probes, tokens, layout.width).to(dtype)
    return x, theta, seeds, scales, native.tt_factors(theta, layout, seeds, scales, 5, "gaussian")[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_tt_adapter_of_few_tokens_is_split(cuda, module, name, dtype):
    """The shim's device has two processors: one token is work for four blocks, two tokens for two each."""
    layout = WIDE[name]
    for probes, tokens, blocks in ((1, 1, 4), (2, 1, 4), (1, 2, 4), (1, 5, 0)):
        floats = module.cuda_tt_adapter_scratch(probes, tokens, layout._encoded, (0, 0))
        assert floats <= blocks * layout.down.bond and (floats > 0) == (blocks > 0)
        x, *_, factors = adapter_case(layout, probes, tokens, dtype)
        y = cuda.tt_adapter(x, factors, layout, "gelu", -0.7)
        oracle = reference.tt_adapter(x.double(), factors.double(), layout, "gelu", -0.7)
        assert_as_exact_as(y, reference.tt_adapter(x, factors, layout, "gelu", -0.7), oracle)


def test_a_split_call_without_scratch_raises(module):
    layout, x, y = WIDE["4096-r5"], torch.zeros(4096), torch.full((4096,), 7.0)
    factors = torch.zeros(layout.factor_numel)
    pointers = (x.data_ptr(), y.data_ptr(), 0, 1, 1, layout._encoded, factors.data_ptr(), layout.factor_numel)
    with pytest.raises(RuntimeError, match="tt_adapter on CUDA device 0: invalid argument"):
        module.cuda_tt_adapter(*pointers, 0, 1.0, 0, (0, 0))
    assert (y == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_tt_adapter_from_cores(cuda, name, dtype):
    layout = WIDE[name]
    cases = zip(checks.ACTS, ((1, 1), (5, 1), (2, 13), (2, 0), (1, 30)), ("gaussian", "rademacher") * 3)
    for act, (probes, tokens), distribution in cases:
        x, theta, seeds, scales, _ = adapter_case(layout, probes, tokens, dtype)
        scales[0] = 0.0
        y = cuda.tt_adapter_from_cores(x, theta, layout, seeds, scales, 2**33 + 3, distribution, act, -0.7)
        factors, exact = (
            reference.tt_factors(t, layout, seeds, scales, 2**33 + 3, distribution)[0] for t in (theta, theta.double())
        )
        oracle = reference.tt_adapter(x.double(), exact, layout, act, -0.7)
        assert_as_exact_as(y, reference.tt_adapter(x, factors, layout, act, -0.7), oracle)


def test_tt_adapter_from_cores_of_many_probes(cuda):
    """More probes than travel with one launch."""
    layout = TTAdapterLayout.auto(64, 8, 2, shapes={"width": (8, 8)})
    x, theta, seeds, scales, factors = adapter_case(layout, 260, 1, torch.float32)
    y = cuda.tt_adapter_from_cores(x, theta, layout, seeds, scales, 5, "gaussian", "tanh", 1.0)
    oracle = reference.tt_adapter(x.double(), factors.double(), layout, "tanh", 1.0)
    assert_as_exact_as(y, reference.tt_adapter(x, factors, layout, "tanh", 1.0), oracle)


def test_tt_adapter_from_cores_says_when_it_cannot(cuda):
    for layout in (TTAdapterLayout.auto(576, 64, 5), TTAdapterLayout.auto(4096, 64, 32)):
        x, theta, seeds, scales, _ = adapter_case(layout, 1, 1, torch.float32)
        with pytest.raises(RuntimeError, match="tt_adapter_from_cores on CUDA device 0: invalid arg"):
            cuda.tt_adapter_from_cores(x, theta, layout, seeds, scales, 0, "gaussian", "relu", 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank(cuda, dtype):
    for probes, tokens, d_in, rank, d_out in LOW_RANK_SHAPES:
        x, base = torch.randn(probes, tokens, d_in).to(dtype), torch.randn(probes, tokens, d_out).to(dtype)
        left, right = torch.randn(probes, d_in, rank), torch.randn(probes, rank, d_out)
        bias = torch.randn(probes, d_out)
        wide = (x.double(), left.double(), right.double())
        y = cuda.tt_linear(x, left, right, bias)
        assert_as_exact_as(y, reference.tt_linear(x, left, right, bias), wide[0] @ wide[1] @ wide[2] + bias[:, None])
        y = cuda.low_rank_linear(x, base, left, right, 0.3)
        oracle = base.double() + 0.3 * (wide[0] @ wide[1] @ wide[2])
        assert_as_exact_as(y, reference.low_rank_linear(x, base, left, right, 0.3), oracle)
