"""tt_adapter: native against the reference (bmm in float32), plain torch at the dtype of x, and a copy.

Bytes: x and the factors read, the result written, once each. `extra_info` holds medians in ms of alternating runs and
the largest error against float64, relative to the largest result.
"""

import pytest
import torch
from timing import SMALL, record, relative_error

from adazeta_kernels import TTAdapterLayout, tt_adapter
from adazeta_kernels.backends import reference

# probes, tokens, layout: long prompts; a prompt of 16 tokens; one token per probe.
CASES = {
    "8x512x1024-64-r5": (8, 512, TTAdapterLayout.auto(1024, 64, 5)),
    "8x512x4096-64-r5": (8, 512, TTAdapterLayout.auto(4096, 64, 5)),
    "32x16x576-8-r2": (32, 16, TTAdapterLayout.auto(576, 8, 2)),
    "256x1x576-8-r2": (256, 1, TTAdapterLayout.auto(576, 8, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def bench_tt_adapter(benchmark, threads, case, dtype):
    probes, tokens, layout = CASES[case]
    if SMALL:
        probes, tokens = 2, min(tokens, 3)
    factors = torch.randn(probes, layout.factor_numel) * 0.1
    x = torch.randn(probes, tokens, layout.width).to(dtype)

    def plain():
        return reference.tt.apply_adapter(x, factors, layout)

    def run(backend):
        return tt_adapter(x, factors, layout, backend=backend)

    exact = reference.tt.apply_adapter(x[:2].double(), factors[:2].double(), layout)
    record(
        benchmark,
        {"native": lambda: run("native"), "reference": lambda: run("reference"), "torch": plain},
        2 * x.numel() * x.element_size() + 4 * factors.numel(),
        op="tt_adapter",
        case=case,
        dtype=str(dtype).removeprefix("torch."),
        error=relative_error(run("native")[:2], exact),
        torch_error=relative_error(plain()[:2], exact),
    )
