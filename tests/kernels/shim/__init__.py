"""Compiles csrc/cuda/*.cu as C++ and loads them as a second extension module whose "device" memory is the CPU's."""

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"


def build(folder: Path):
    """Build the module in `folder`, unless the same sources were built there before, and import it.

    Raises:
        subprocess.CalledProcessError: a source does not compile; the compiler's message is on standard error.
    """
    import pybind11

    sources = [
        *sorted((CSRC / "cuda").glob("*.cu")),
        CSRC / "bindings.cpp",
        CSRC / "cpu/huge_pages.cpp",
        HERE / "shim.cpp",
    ]
    seen = sorted([*CSRC.rglob("*.h"), *HERE.glob("*.h"), *sources, Path(__file__)])
    key = hashlib.sha256(b"".join(path.read_bytes() for path in seen)).hexdigest()[:16]
    folder = folder / f"shim-{key}"
    module = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists():
        folder.mkdir(parents=True, exist_ok=True)
        includes = [HERE, CSRC, CSRC / "include", sysconfig.get_path("include"), pybind11.get_include()]
        flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
        flags += ["-DADAZETA_CUDA_SHIM", "-DADAZETA_WITH_CUDA", *(f"-I{path}" for path in includes)]

        def compile_one(source):
            target = folder / f"{source.name}.o"
            level = "-O0" if source.name == "bindings.cpp" else "-O1"
            subprocess.run(["g++", *flags, level, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        unfinished = module.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", "-shared", *objects, "-o", str(unfinished)], check=True)
        unfinished.rename(module)
    spec = importlib.util.spec_from_file_location("_native", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
