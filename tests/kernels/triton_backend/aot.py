"""Ahead-of-time compilation of the Triton kernels, without a GPU, in a process of its own.

    reports(["perturb"], ["sm_90"])                     what the specimens of kernel files compile to
    python aot.py fill_normal perturb --targets sm_90   the same as a table; no name means every kernel file
    python aot.py --resources FILE                      keeps it as JSON too, which benchmarks/report_compiled.py reads

The process is fresh because kernels that the interpreter has decorated cannot be compiled. ptxas and the assembler of
LLVM come with Triton.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
ROOT = Path(__file__).parents[3]
MODULES = ["fill_normal", "perturb", "perturb_rows", "launch", "tt_factors", "tt_adapter", "low_rank_linear"]


@dataclass
class Report:
    """One compiled kernel.

    Attributes:
        registers: of a thread (vector registers on AMD).
        spills: bytes of a thread that live in memory instead.
        shared: bytes of a program.
        llir: LLVM's intermediate code, for the processor.
        asm: PTX, or AMD's assembly.
    """

    name: str
    target: str
    registers: int
    spills: int
    shared: int
    llir: str
    asm: str


def reports(modules: list[str], targets: list[str], match: str = "") -> list[Report]:
    """Compile the specimens of `adazeta_kernels.backends.triton.<module>` in whose names the regex `match` is found."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in path if p)
    command = [sys.executable, __file__, *modules, "--json", "--match", match, "--targets", *targets]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr}")
    return [Report(**json.loads(line)) for line in done.stdout.splitlines()]


def compile_specimen(specimen, target: str) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = specimen.kernel.arg_names
    constexprs = {(names.index(name),): value for name, value in specimen.constexprs.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in specimen.aligned}
    signature = {name: specimen.signature.get(name, "constexpr") for name in names}
    options = {
        "num_warps": specimen.num_warps,
        "num_stages": specimen.num_stages,
        "enable_fp_fusion": specimen.fp_fusion,
    }
    source = ASTSource(specimen.kernel, signature, constexprs, attributes)
    kernel = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    shared = kernel.metadata.shared
    if target.startswith("sm_"):
        asm = kernel.asm["ptx"]
        registers, spills = _resources_of_cubin(kernel.asm["cubin"])
    else:
        asm = kernel.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{name}:\s*(\d+)", asm)[1]) for name in ("vgpr_count", "private_segment_fixed_size")
        )
    return Report(specimen.name, target, registers, spills, shared, kernel.asm["llir"], asm)


def _resources_of_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as cuobjdump reads them."""
    from triton import knobs

    tool = Path(knobs.nvidia.cuobjdump.path)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return int(found[1]), int(found[2]) + int(found[3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=MODULES, metavar="module", help="kernel file, such as perturb")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--match", default="", help="regular expression on names of specimens")
    parser.add_argument("--json", action="store_true", help="whole reports, one a line")
    parser.add_argument("--resources", type=Path, help="also write registers, spills and shared bytes to this file")
    arguments = parser.parse_args()
    files = [importlib.import_module(f"adazeta_kernels.backends.triton.{name}") for name in arguments.modules]
    resources = []
    for specimen in (specimen for file in files for specimen in file.specimens()):
        if not re.search(arguments.match, specimen.name):
            continue
        for target in arguments.targets:
            report = compile_specimen(specimen, target)
            resources.append({k: value for k, value in asdict(report).items() if k not in ("llir", "asm")})
            if arguments.json:
                print(json.dumps(asdict(report)), flush=True)
            else:
                print(
                    f"{report.name:50} {target:7} {report.registers:4} registers {report.spills:4} bytes spilled "
                    f"{report.shared:6} bytes shared",
                    flush=True,
                )
    if arguments.resources:
        lines = ",\n".join(json.dumps(kernel) for kernel in resources)
        head = json.dumps(_origin(), indent=1)[:-2]
        arguments.resources.write_text(f'{head},\n "kernels": [\n{lines}\n]}}\n')


def _origin() -> dict[str, object]:
    """Where figures come from: command, commit, and versions of what compiled."""
    import triton

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return {
        "command": " ".join(["python", str(Path(__file__).relative_to(ROOT)), *sys.argv[1:]]),
        "commit": git("rev-parse", "HEAD"),
        "changed_files": git("status", "--short", "--untracked-files=no").splitlines(),
        "python": platform.python_version(),
        "triton": triton.__version__,
        "ptxas": triton.knobs.nvidia.ptxas.version,
        "ptxas_blackwell": triton.knobs.nvidia.ptxas_blackwell.version,
    }


if __name__ == "__main__":
    main()
