"""perturb_ in place: native against plain torch and the reference, and against the time of a copy of as many bytes.

    make bench                                       JSON under benchmarks/results/local
    ADAZETA_BENCH_ELEMENTS=100000000 make bench      1e8 elements instead of 1.7e7

Each record's `extra_info` holds bytes moved, medians in ms of alternating runs (native, copy, negation in place, plain
torch), their ratios, and elements per second. The reference is timed once, on fewer elements: an oracle, not a
competitor.
"""

import time

import pytest
import torch
from timing import ELEMENTS, copy_function, machine, paired_seconds

from adazeta_kernels import perturb_

REFERENCE_ELEMENTS = min(ELEMENTS, 1 << 18)


def plain_torch(params, distribution):
    """The usual way: draw a tensor of noise, add it scaled."""

    def run():
        for param in params:
            if distribution == "gaussian":
                noise = torch.normal(0.0, 1.0, param.shape, dtype=param.dtype)
            else:
                noise = torch.randint_like(param, 0, 2).mul_(2).sub_(1)
            param.add_(noise, alpha=1e-3)

    return run


def reference_elements_per_second(dtype, distribution):
    theta = torch.randn(REFERENCE_ELEMENTS).to(dtype)
    start = time.perf_counter()
    perturb_([theta], [1], [1e-3], distribution=distribution, backend="reference")
    return REFERENCE_ELEMENTS / (time.perf_counter() - start)


def record(benchmark, params, seeds, scales, distribution, others):
    """Time native and `others` in turns, then let pytest-benchmark time native; write both down."""

    def native():
        perturb_(params, seeds, scales, distribution=distribution, backend="native")

    elements = sum(p.numel() for p in params)
    moved = sum(2 * p.numel() * p.element_size() for p in params)
    in_place = [torch.ones_like(p) for p in params]

    def negate():
        for param in in_place:
            param.neg_()

    seconds = paired_seconds({"native": native, "copy": copy_function(moved), "in_place": negate, **others})
    benchmark.extra_info.update(
        **machine(),
        elements=elements,
        seeds=len(seeds),
        bytes=moved,
        copy_gb_per_s=moved / seconds["copy"] / 1e9,
        percent_of_copy=100 * seconds["copy"] / seconds["native"],
        percent_of_in_place=100 * seconds["in_place"] / seconds["native"],
        elements_per_s=elements * len(seeds) / seconds["native"],
        **{f"{name}_ms": 1e3 * value for name, value in seconds.items()},
        **{f"times_{name}": seconds[name] / seconds["native"] for name in others},
    )
    benchmark.pedantic(native, rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def bench_one_seed(benchmark, threads, dtype, distribution):
    params = [torch.randn(ELEMENTS).to(dtype)]
    record(benchmark, params, [1], [1e-3], distribution, {"torch": plain_torch(params, distribution)})
    benchmark.extra_info["reference_elements_per_s"] = reference_elements_per_second(dtype, distribution)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("seeds", [2, 20])
def bench_many_seeds(benchmark, threads, seeds, distribution):
    """An update of all queries in one pass, against one pass per query."""
    params = [torch.randn(min(ELEMENTS, 10_000_000))]

    def one_by_one():
        for seed in range(seeds):
            perturb_(params, [seed], [1e-3], distribution=distribution, backend="native")

    record(benchmark, params, list(range(seeds)), [1e-3] * seeds, distribution, {"one_by_one": one_by_one})


@torch.no_grad()
def bench_many_tensors(benchmark, threads):
    """A thousand tensors of 1 to 2,000 elements, against one tensor as long as all; without grad, as in a step."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n) for n in torch.randint(1, 2001, (1000,), generator=generator).tolist()]
    whole = [torch.cat(params)]
    record(
        benchmark,
        params,
        [1],
        [1e-3],
        "gaussian",
        {
            "one_tensor": lambda: perturb_(whole, [1], [1e-3], backend="native"),
            "torch": plain_torch(params, "gaussian"),
        },
    )
