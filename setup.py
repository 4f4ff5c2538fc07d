"""Builds the extension module adazeta_kernels._native with CMake; everything else is in pyproject.toml.

Environment variables: ADAZETA_BUILD_CUDA=auto|0|1 (default auto: with CUDA when nvcc works), CUDACXX (which nvcc), CXX,
CMAKE_ARGS (more arguments for CMake), CMAKE_BUILD_PARALLEL_LEVEL (jobs).
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).parent.resolve()


def find_tool(name, package_folder):
    """Path of a program on PATH, beside this Python, or inside the pip package that carries it; None if absent."""
    folders = [os.environ.get("PATH", ""), sysconfig.get_path("scripts")]
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin:
        folders.append(str(Path(spec.origin).parent / package_folder))
    return shutil.which(name, path=os.pathsep.join(folders))


def build_tools():
    """CMake, a generator for it, and pybind11's CMake folder.

    Raises:
        SetupError: one is missing; the message says what to install.
    """
    cmake = find_tool("cmake", "data/bin")
    ninja = find_tool("ninja", "data/bin")
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    missing = []
    if cmake is None:
        missing.append("CMake (pip install cmake)")
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11 (pip install pybind11)")
    if ninja is None and shutil.which("make") is None:
        missing.append("Ninja (pip install ninja) or make")
    if not any(shutil.which(shlex.split(compiler)[0]) for compiler in compilers):
        missing.append(f"a C++17 compiler (looked for {', '.join(compilers)}; on Debian or Ubuntu: apt install g++)")
    if missing:
        raise SetupError(
            f"cannot build adazeta_kernels._native without {'; '.join(missing)}. "
            "pip installs the Python ones by itself unless --no-build-isolation is given."
        )
    import pybind11

    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
    return cmake, generator, pybind11.get_cmake_dir()


class CMakeBuild(build_ext):
    def build_extension(self, extension):
        cmake, generator, pybind11_dir = build_tools()
        output = Path(self.get_ext_fullpath(extension.name)).parent.resolve()
        build = Path(self.build_temp).resolve() / extension.name
        # A cache of an earlier build may name tools of an isolated environment that is gone.
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            *generator,
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_dir}",
            f"-DADAZETA_OUTPUT_DIR={output}",
            f"-DADAZETA_BUILD_CUDA={os.environ.get('ADAZETA_BUILD_CUDA') or 'auto'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        environment = dict(os.environ)
        environment.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        for command in (configure, [cmake, "--build", str(build)]):
            try:
                subprocess.run(command, check=True, env=environment)
            except subprocess.CalledProcessError as error:
                raise SetupError(
                    f"building adazeta_kernels._native failed (exit status {error.returncode} of "
                    f"`{shlex.join(command[:2])} ...`); CMake's own message is above"
                ) from None


setup(ext_modules=[Extension("adazeta_kernels._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
