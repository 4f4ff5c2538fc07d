"""tt_factors, tt_adapter, tt_linear and low_rank_linear compiled ahead of time for four GPUs: resources, instructions.

ADAZETA_AOT=all compiles every configuration that tuning may choose, for every dtype, padded rank and stage: some
hundred kernels, half an hour. Without it a few stand for them.
"""

import os
import re
from functools import cache

import pytest

pytest.importorskip("triton", reason="the Triton backend needs the package triton")

from aot import TARGETS, reports  # noqa: E402

from adazeta_kernels.backends.triton import token_launch  # noqa: E402
from adazeta_kernels.backends.triton.launch import LIMITS  # noqa: E402

MODULES = ["tt_factors", "tt_adapter", "low_rank_linear"]
FEW = "|".join(
    [
        r"tt_adapter bf16 rank=16 64x64 stage=0$",
        r"low_rank fp16 rank=16 16x128 stage=2",
        r"tt_factors rank=16 64x64",
        r"perturb_cores gaussian",
    ]
)
TENSOR_CORES = {
    "sm_80": r"mma\.sync",
    "sm_90": r"mma\.sync|wgmma\.mma_async",
    "sm_100": r"mma\.sync|tcgen05\.mma",
    "gfx942": r"v_mfma_f32_\w*bf16",
}

pytestmark = pytest.mark.slow


@cache
def _all_compiled():
    return reports(MODULES, list(TARGETS), "" if os.environ.get("ADAZETA_AOT") == "all" else FEW)


def compiled(target):
    return [report for report in _all_compiled() if report.target == target]


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_within_limits(target):
    kind, processor, _ = TARGETS[target]
    for report in compiled(target):
        print(f"{report.name:55} {target:7} {report.registers:4} registers {report.shared:6} bytes shared")
        assert report.spills == 0, report.name
        assert report.shared <= LIMITS[kind, processor].shared_bytes, report.name
        assert report.registers <= LIMITS[kind, processor].registers, report.name
    names = " ".join(report.name for report in compiled(target))
    assert all(name in names for name in ("tt_adapter", "low_rank", "tt_factors", "perturb_cores"))


@pytest.mark.parametrize("target", TARGETS)
def test_products_run_on_tensor_cores(target):
    """All of them: a product that fell back to ordinary arithmetic would leave an fma for each of its terms."""
    for report in compiled(target):
        if report.name.startswith("perturb_cores"):
            continue  # no product of blocks
        assert re.search(TENSOR_CORES[target], report.asm), report.name
        if target.startswith("sm_"):
            assert len(re.findall(r"\bfma\.rn", report.asm)) < 1500, report.name


@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm_")])
def test_tokens_are_read_16_bytes_at_a_time(target):
    """Wherever a chunk that is read, or a block that is written, has as many for each of 128 threads."""
    seen = set()
    for report in compiled(target):
        if not report.name.startswith("tt_adapter") or "odd" in report.name:
            continue
        dtype, rank, tokens, width, stage = re.search(r" (\w+) rank=(\d+) (\d+)x(\d+) stage=(\d)", report.name).groups()
        row = int(tokens) * (4 if dtype == "fp32" else 2)
        if stage != "2" and row * token_launch.depth(int(rank), stage != "0") >= 16 * 128:
            loads = r"cp\.async\.cg[\w.:]* \[[^\]]*\], \[[^\]]*\], (?:0x10|16)"
            assert re.search(loads, report.asm), report.name
            seen.add("read")
        if stage != "1" and row * int(width) >= 16 * 128:
            assert re.search(r"st\.global[\w.:]*\.v4\.b32", report.asm), report.name
            seen.add("written")
    assert seen == {"read", "written"}
