"""The Triton ops on a GPU beside native CUDA: the cases of bench_cuda.py, timed in the same way.

    python -m pytest benchmarks/bench_triton.py --benchmark-only     skipped where torch sees no GPU

`extra_info` holds, in microseconds, medians of triton, native and copy, measured in turns, bytes that have to move, and
what part of the copy's bandwidth and of native's speed was reached. Configurations are tuned first, as in use.
"""

import pytest
import torch
from bench_cuda import ROUNDS, microseconds

from adazeta_kernels import TTAdapterLayout, fill_normal_, low_rank_linear, perturb_, tt_adapter, tt_factors, tt_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none"),
]
LAYOUT = TTAdapterLayout.auto(4096, 64, 5)


def record(benchmark, call, moved):
    """Time `call(backend)` of both backends and a copy of `moved` bytes (read and written) in turns."""
    source = torch.empty(max(moved // 2, 1), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    functions = {name: lambda name=name: call(name) for name in ("triton", "native")}
    functions["triton"]()  # compiles and tunes
    median = microseconds(functions | {"copy": lambda: target.copy_(source)})
    benchmark.extra_info.update(
        bytes=moved,
        triton_us=median["triton"],
        native_us=median["native"],
        copy_us=median["copy"],
        percent_of_copy=100 * median["copy"] / median["triton"],
        percent_of_native=100 * median["native"] / median["triton"],
        device=torch.cuda.get_device_name(),
    )

    def synchronised():
        functions["triton"]()
        torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=ROUNDS, warmup_rounds=2)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_triton_fill_normal(benchmark, dtype, distribution):
    out = torch.empty(10**8, device="cuda", dtype=dtype)
    record(benchmark, lambda backend: fill_normal_(out, 1, distribution=distribution, backend=backend), out.nbytes)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_triton_perturb(benchmark, dtype, distribution):
    theta = torch.randn(10**8, device="cuda").to(dtype)

    def call(backend):
        perturb_([theta], [1], [1e-3], distribution=distribution, backend=backend)

    record(benchmark, call, 2 * theta.nbytes)


def bench_triton_update_of_20_seeds(benchmark):
    theta, seeds, scales = torch.randn(10**6, device="cuda"), list(range(20)), [1e-3] * 20
    record(benchmark, lambda backend: perturb_([theta], seeds, scales, decay=0.999, backend=backend), 2 * theta.nbytes)


def bench_triton_tt_factors(benchmark):
    """96 adapters of 4096 <-> 64, rank 5, at 40 probes, in one launch."""
    theta = torch.randn(96 * LAYOUT.numel, device="cuda")
    seeds, scales = torch.arange(40), torch.full((40,), 1e-3)
    moved = 4 * 96 * 40 * LAYOUT.factor_numel + theta.nbytes
    record(benchmark, lambda backend: tt_factors(theta, LAYOUT, seeds, scales, adapters=96, backend=backend), moved)


def token_inputs(tokens, dtype):
    """40 probes, width 4096; 1,024 tokens a probe are 40,960 rows."""
    theta = torch.randn(LAYOUT.numel, device="cuda") * 0.1
    factors = tt_factors(theta, LAYOUT, list(range(40)), [1e-3] * 40, backend="native")
    return torch.randn(40, tokens, 4096, device="cuda").to(dtype), factors


@pytest.mark.parametrize("tokens", [1, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def bench_triton_tt_adapter(benchmark, tokens, dtype):
    x, factors = token_inputs(tokens, dtype)
    record(benchmark, lambda backend: tt_adapter(x, factors, LAYOUT, backend=backend), 2 * x.nbytes + factors.nbytes)


@pytest.mark.parametrize("tokens", [1, 1024])
def bench_triton_tt_linear(benchmark, tokens):
    """4096 -> 64, bfloat16."""
    x, factors = token_inputs(tokens, torch.bfloat16)
    left, right, bias, *_ = LAYOUT.split_factors(factors)
    moved = x.nbytes + x.nbytes // 64 + sum(4 * t.numel() for t in (left, right, bias))
    record(benchmark, lambda backend: tt_linear(x, left, right, bias, backend=backend), moved)


@pytest.mark.parametrize("tokens", [1, 1024])
@pytest.mark.parametrize("rank", [8, 64])
def bench_triton_low_rank_linear(benchmark, tokens, rank):
    """LoRA of 4096 x 4096 at 40 probes, bfloat16."""
    x, _ = token_inputs(tokens, torch.bfloat16)
    base, A = torch.randn_like(x), torch.randn(40, 4096, rank, device="cuda")
    moved = 3 * x.nbytes + 2 * A.nbytes
    record(benchmark, lambda backend: low_rank_linear(x, base, A, A.mT.contiguous(), backend=backend), moved)
