"""tt_factors: native against plain torch (draw noise, add it scaled, contract by bmm), and a copy of as many bytes.

Bytes: theta read and the factors written, once each. `extra_info` holds medians in ms of alternating runs over all
adapters, one call each, and the largest error against float64, relative to the largest factor. The reference backend,
which generates the specified directions in numpy, is timed once on one adapter.
"""

import time

import pytest
import torch
from timing import SMALL, record, relative_error

from adazeta_kernels import TTAdapterLayout, tt_factors
from adazeta_kernels.backends.reference.tt import contract_cores

# adapters, probes, layout: all of Llama-2-7B as in the paper; one site of SmolLM2 with one token per probe.
CASES = {
    "96x4096-64-r5-p40": (96, 40, TTAdapterLayout.auto(4096, 64, 5)),
    "10x576-8-r2-p256": (10, 256, TTAdapterLayout.auto(576, 8, 2)),
}
SCALE = 1e-3


@pytest.mark.parametrize("case", CASES)
def bench_tt_factors(benchmark, threads, case):
    adapters, probes, layout = CASES[case]
    if SMALL:
        adapters, probes = 2, 3
    thetas = torch.randn(adapters, layout.numel) * 0.3
    seeds, scales = torch.arange(probes), torch.full((probes,), SCALE)

    def run(backend):
        for i, theta in enumerate(thetas):
            tt_factors(theta, layout, seeds, scales, offset=i * layout.numel, backend=backend)

    def torch_way():
        for theta in thetas:
            contract_cores(theta + SCALE * torch.randn(probes, layout.numel), layout)

    start = time.perf_counter()
    tt_factors(thetas[0], layout, seeds, scales, backend="reference")
    reference = time.perf_counter() - start
    exact = tt_factors(thetas[0].double(), layout, seeds, scales)
    native, plain = (tt_factors(thetas[0], layout, seeds, scales, backend=b) for b in ("native", "reference"))
    record(
        benchmark,
        {"native": lambda: run("native"), "torch": torch_way},
        4 * (layout.numel + probes * layout.factor_numel),
        calls=adapters,
        op="tt_factors",
        case=case,
        reference_ms=1e3 * adapters * reference,
        error=relative_error(native, exact),
        torch_error=relative_error(plain, exact),
    )
