"""Every .cu file through nvcc for sm_80 and sm_90: no spills, no stack frame, registers under a limit, and 16-byte
loads and stores in the machine code. No GPU is needed."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
ARCHITECTURES = ("80", "90")
FLAGS = [
    "-DADAZETA_WITH_CUDA",
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "--ftz=false",
    "--prec-sqrt=true",
    "--prec-div=true",
]
# Kernel -> most registers of a thread. A multiprocessor has 65,536: 64 leave room for 1,024 threads, 128 for 512. The
# kernels that hold tiles of tokens take what one block of 256 threads can have, for loads that are under way together.
REGISTERS = {
    "fill_normal_kernel": 64,
    "perturb_kernel": 64,
    "perturb_rows_kernel": 64,
    "tt_factors_kernel": 64,
    "tt_adapter_kernel": 255,
    "tt_adapter_project_kernel": 128,
    "tt_adapter_expand_kernel": 128,
    "tt_adapter_from_cores_kernel": 255,
    "low_rank_kernel": 255,
}

DECLARED_SHARED_BYTES = 8 << 10  # csrc/cuda/launch.h counts on it, and so does the shim
KERNELS = ["fill_normal", "perturb", "perturb_rows", "tt_factors", "tt_adapter", "tt_adapter_from_cores", "low_rank"]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is missing: no CUDA source can be compiled")


def compile_one(source, folder):
    """The resource report of ptxas for both architectures, and the PTX of each."""
    kept = folder / source.stem
    kept.mkdir()
    command = ["nvcc", *FLAGS, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", "-Xptxas=-v", "-fatbin"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command += ["--keep", f"--keep-dir={kept}", str(source), "-o", str(kept / "out.fatbin")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return run.stderr, {arch: (kept / f"{source.stem}.compute_{arch}.ptx").read_text() for arch in ARCHITECTURES}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nvcc")
    sources = sorted(CUDA.glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda source: compile_one(source, folder), sources))
    return {source.stem: result for source, result in zip(sources, results)}


def resources(report):
    """Of every kernel in the report: name, architecture, registers, bytes of stack and spills, of shared arrays."""
    pattern = r"for 'sm_(\d+)'\nptxas info\s+: Function properties for (\S+)\n"
    pattern += r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    pattern += r"ptxas info\s+: Used (\d+) registers(?:.*?, (\d+) bytes smem)?"
    return [
        (name, arch, int(used), int(a) + int(b) + int(c), int(shared or 0))
        for arch, name, a, b, c, used, shared in re.findall(pattern, report)
    ]


def test_registers_stack_and_spills(compiled):
    seen, declared = set(), 0
    for report, _ in compiled.values():
        for name, arch, registers, spilled, shared in resources(report):
            kernel = next(k for k in sorted(REGISTERS, key=len, reverse=True) if k in name)
            seen.add((kernel, arch))
            print(f"{kernel} sm_{arch}: {registers} registers, {spilled} bytes of stack and spills")
            assert spilled == 0, name
            assert registers <= REGISTERS[kernel], name
            declared = max(declared, shared)
    assert 0 < declared <= DECLARED_SHARED_BYTES
    assert seen == {(kernel, arch) for kernel in REGISTERS for arch in ARCHITECTURES}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("file", KERNELS)
def test_16_byte_accesses(compiled, file, arch):
    ptx = compiled[file][1][arch]
    if file != "fill_normal":
        assert re.search(r"ld(\.global|\.param)?(\.nc)?\.v4\.\w*32", ptx)
    assert re.search(r"st(\.global)?\.v4\.\w*32", ptx)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("file", ["tt_adapter", "tt_adapter_from_cores", "low_rank"])
def test_aligned_tokens_take_16_byte_accesses_alone(compiled, file, arch):
    """Every store of a result, and the loads of several tokens before the first is used."""
    entries = re.split(r"\.entry\s+", compiled[file][1][arch])[1:]
    chosen = [entry for entry in entries if "VectorAccess" in entry.partition("(")[0]]
    assert len(chosen) == 3  # one per dtype
    for entry in chosen:
        stores = re.findall(r"\bst\.global\S*", entry)
        assert len(stores) >= 8 and all(".v4." in store for store in stores), stores
        before_use = [len(re.findall(r"\bld\.global\S*v4", part)) for part in entry.split("fma.rn.f32")]
        assert max(before_use) >= 8, before_use


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("file", ["fill_normal", "perturb", "perturb_rows", "tt_factors"])
def test_no_fused_or_approximate_arithmetic(compiled, file, arch):
    """Bits depend on it: fma only where the source says so, square root correctly rounded, subnormals kept."""
    ptx = compiled[file][1][arch]
    assert "fma.rn.f32" in ptx and "sqrt.rn.f32" in ptx
    assert not re.search(r"\.ftz|\.approx|\bmad\.\w*f32|div\.full", ptx)
