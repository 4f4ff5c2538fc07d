"""The ops on a GPU, native and Triton: time by CUDA events, against a copy of as many bytes and against plain torch.

    python -m pytest benchmarks/bench_cuda.py --benchmark-only     skipped where torch sees no GPU

`extra_info` holds, in microseconds, medians of native, Triton, copy and plain torch (null where a case has none),
measured in turns; bytes that have to move; what part of the copy's bandwidth native reached, and what part of native's
speed Triton.
"""

import statistics
from functools import partial

import pytest
import torch

from adazeta_kernels import TTAdapterLayout, backends, perturb_, tt_adapter, tt_factors
from adazeta_kernels.backends import native_cuda, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none"),
]
ROUNDS = 20


def microseconds(functions):
    """Median of every function, taken in turns, between events on the device."""
    times = {name: [] for name in functions}
    for turn in range(ROUNDS + 3):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(2_000_000)  # the host is ahead when the events are reached: its own time is not counted
            start.record()
            function()
            end.record()
            end.synchronize()
            if turn >= 3:
                times[name].append(1e3 * start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def record(benchmark, call, moved, plain=None, *, triton=True):
    """Time `call` of a backend, a copy of `moved` bytes (read and written) and `plain`, then let pytest-benchmark time
    native. Where Triton cannot run, `triton_missing` holds the reason."""
    source = torch.empty(max(moved // 2, 1), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    native, missing = partial(call, "native"), backends()["triton"] if triton else "no such kernel"
    functions = {"native": native, "copy": lambda: target.copy_(source)}
    if missing is None:
        functions["triton"] = partial(call, "triton")
    median = microseconds(functions | ({"plain": plain} if plain else {}))
    benchmark.extra_info.update(
        bytes=moved,
        native_us=median["native"],
        triton_us=median.get("triton"),
        triton_missing=missing,
        copy_us=median["copy"],
        plain_us=median.get("plain"),
        percent_of_copy=100 * median["copy"] / median["native"],
        triton_percent_of_native=100 * median["native"] / median["triton"] if missing is None else None,
        device=torch.cuda.get_device_name(),
    )

    def synchronised():
        native()
        torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=ROUNDS, warmup_rounds=2)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_cuda_perturb(benchmark, dtype, distribution):
    theta = torch.randn(10**8, device="cuda").to(dtype)

    def plain():
        theta.add_(torch.normal(0.0, 1.0, theta.shape, dtype=dtype, device="cuda"), alpha=1e-3)

    def call(backend):
        perturb_([theta], [1], [1e-3], distribution=distribution, backend=backend)

    record(benchmark, call, 2 * theta.nbytes, plain)


def bench_cuda_update_of_20_seeds(benchmark):
    theta, seeds, scales = torch.randn(10**6, device="cuda"), list(range(20)), [1e-3] * 20

    def call(backend):
        perturb_([theta], seeds, scales, decay=0.999, backend=backend)

    record(benchmark, call, 2 * theta.nbytes)


def bench_cuda_tt_factors(benchmark):
    """96 adapters of 4096 <-> 64, rank 5, at 40 probes, in one launch: 703 MB of factors have to be written."""
    layout = TTAdapterLayout.auto(4096, 64, 5)
    theta = torch.randn(96 * layout.numel, device="cuda")
    seeds, scales = torch.arange(40), torch.full((40,), 1e-3)
    moved = 4 * 96 * 40 * layout.factor_numel + theta.nbytes
    record(benchmark, lambda backend: tt_factors(theta, layout, seeds, scales, adapters=96, backend=backend), moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 32, 1024])
def bench_cuda_tt_adapter(benchmark, tokens, dtype):
    """40 probes, width 4096; 1,024 tokens a probe are 40,960 rows. 1 token is split over d."""
    layout = TTAdapterLayout.auto(4096, 64, 5)
    theta = torch.randn(layout.numel, device="cuda") * 0.1
    factors = tt_factors(theta, layout, list(range(40)), [1e-3] * 40, backend="native")
    x = torch.randn(40, tokens, 4096, device="cuda").to(dtype)
    record(
        benchmark,
        lambda backend: tt_adapter(x, factors, layout, backend=backend),
        2 * x.nbytes + factors.nbytes,
        lambda: reference.tt_adapter(x, factors, layout, "relu", 1.0),
    )


@pytest.mark.parametrize("way", ["two_ops", "from_cores"])
@pytest.mark.parametrize("tokens", [1, 32, 1024])
def bench_cuda_adapter_at_probes(benchmark, tokens, way):
    """From theta to the adapted tokens: tt_factors then tt_adapter, or one kernel that keeps factors out of memory.

    What `from_cores` gains decides whether an op should call it. Bytes are those that have to move in either: x read,
    y written, theta read.
    """
    layout = TTAdapterLayout.auto(4096, 64, 5)
    theta = torch.randn(layout.numel, device="cuda") * 0.1
    seeds, scales = torch.arange(40), torch.full((40,), 1e-3)
    x = torch.randn(40, tokens, 4096, device="cuda").bfloat16()

    def two_ops(backend):
        factors = tt_factors(theta, layout, seeds, scales, backend=backend)
        return tt_adapter(x, factors, layout, backend=backend)

    def from_cores(backend):
        return native_cuda.tt_adapter_from_cores(x, theta, layout, seeds, scales, 0, "gaussian", "relu", 1.0)

    torch.testing.assert_close(from_cores("native"), two_ops("native"), rtol=2**-7, atol=2**-7)
    call = {"two_ops": two_ops, "from_cores": from_cores}[way]
    record(benchmark, call, 2 * x.nbytes + theta.nbytes, triton=way == "two_ops")
