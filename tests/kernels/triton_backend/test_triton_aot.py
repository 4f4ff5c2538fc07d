"""fill_normal_, perturb_ and perturb_rows compiled ahead of time for four GPUs: resources and instructions.

Every configuration that tuning may choose, for every dtype and distribution, is compiled with ADAZETA_AOT=all (some
minutes the first time, then Triton's cache has them); elsewhere one configuration is.
"""

import os
import re
from functools import cache

import pytest

pytest.importorskip("triton", reason="the Triton backend needs the package triton")

from aot import TARGETS, reports  # noqa: E402

from adazeta_kernels.backends.triton.compat import VERSION  # noqa: E402
from adazeta_kernels.backends.triton.launch import LIMITS  # noqa: E402

MODULES = ["fill_normal", "perturb", "perturb_rows", "launch"]
FEW = r"dtype=[03] .* 1024/4|write_words"  # float32 and a list of mixed dtypes

pytestmark = pytest.mark.slow


@cache
def _all_compiled():
    return reports(MODULES, list(TARGETS), "" if os.environ.get("ADAZETA_AOT") == "all" else FEW)


def compiled(target):
    return [report for report in _all_compiled() if report.target == target]


def limit(target):
    kind, processor, _ = TARGETS[target]
    return LIMITS[kind, processor]


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_within_limits(target):
    """Registers leave room for two programs of 256 threads, so that one computes while the other waits for memory."""
    for report in compiled(target):
        print(f"{report.name:45} {target:7} {report.registers:4} registers {report.shared:6} bytes shared")
        assert report.spills == 0, report.name
        assert report.shared <= limit(target).shared_bytes // 2, report.name
        assert report.registers <= 128, report.name


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_compiled(target):
    names = {report.name for report in compiled(target)}
    for op in ("fill_normal", "perturb", "perturb_rows"):
        for distribution in ("gaussian", "rademacher"):
            assert any(name.startswith(f"{op} ") and distribution in name for name in names)


@pytest.mark.parametrize("target", TARGETS)
def test_no_product_feeds_a_sum(target):
    """In LLVM's code, where the operands of an instruction are names: nothing there could be contracted to an fma, and
    no instruction is allowed to be. Fused multiply-adds and square roots are those of the kernel."""
    for report in compiled(target):
        products = set()
        for result, operation, operands in re.findall(r"(%[\w.]+) = (?:tail call )?(\w+) (.*)", report.llir):
            fed = not products.isdisjoint(re.findall(r"%[\w.]+", operands))
            assert not (fed and operation in ("fadd", "fsub")), f"{report.name}: {operation} {operands}"
            if operation == "fmul" or (fed and operation in ("extractelement", "insertelement", "shufflevector")):
                products.add(result)
        flags = r"\b(?:fmul|fadd|fsub|fdiv|call)\b[^=\n]*\b(?:fast|contract|reassoc|afn|arcp)\b"
        assert not re.findall(flags, report.llir), report.name
        assert "!fpmath" not in report.llir
        if "gaussian" in report.name:
            assert products and "@llvm.fma." in report.llir, report.name


@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm_")])
def test_instructions_of_nvidia(target):
    """Every operation is rounded to nearest and keeps subnormals; ptxas contracts nothing that says `.rn`."""
    for report in compiled(target):
        operations = set(re.findall(r"\b(?:add|sub|mul|fma|sqrt|div|rcp)\.[\w.]*f32(?:x2)?\b", report.asm))
        assert all(".rn." in operation and ".ftz" not in operation for operation in operations), report.name
        operations = {operation.removesuffix("x2") for operation in operations}  # two at a time on sm_100
        if "gaussian" in report.name:
            assert {"fma.rn.f32", "sqrt.rn.f32"} <= operations, report.name
        if report.name.startswith("perturb"):
            assert "fma.rn.f32" in operations, report.name
            assert re.search(r"ld\.global[\w.:]*\.v4\.b32", report.asm), f"{report.name}: no loads of 16 bytes"
        if report.name != "write_words":
            assert re.search(r"st\.global[\w.:]*\.v4\.b32", report.asm), f"{report.name}: no stores of 16 bytes"


def test_instructions_of_amd():
    """float32 is rounded to nearest and keeps subnormals, and nothing rounds a product before adding it (v_mac, v_mad).

    A square root is an estimate (v_sqrt, in Triton 3.6 v_rsq) that fma steps correct to the nearest number.
    """
    for report in compiled("gfx942"):
        assert ".amdhsa_float_round_mode_32 0" in report.asm and ".amdhsa_float_denorm_mode_32 3" in report.asm
        assert not re.findall(r"\bv_(?:mac|mad)_f32", report.asm), report.name
        if "gaussian" in report.name:
            assert re.search(r"\bv_(?:pk_)?fma\w*_f32", report.asm) and re.search(r"v_(?:sqrt|rsq)_f32", report.asm)
        if report.name != "write_words" and VERSION >= (3, 9):  # 3.6 forgets the alignment of an address it computed
            # 1,024 numbers of 16 bits are 8 bytes for each of 4 x 64 threads.
            width = 2 if re.search(r"dtype=[12] .* 1024/4", report.name) else 4
            assert f"_store_dwordx{width}" in report.asm, f"{report.name}: no wide stores"
