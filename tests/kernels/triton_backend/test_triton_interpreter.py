"""Runs the files test_interpreted_*.py, each in a process under Triton's interpreter.

The Triton of this environment runs all of them. Every one named by ADAZETA_TEST_TRITON (folders made by
`pip install --target FOLDER --no-deps triton==3.6.0`, separated as in PATH) runs a part; CI tests the oldest version.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton backend needs the package triton")

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FOLDERS = ["", *filter(None, os.environ.get("ADAZETA_TEST_TRITON", "").split(os.pathsep))]

# Of an old Triton the language is in question: what uses all of it that each kernel needs.
OLD = "vectors or mixed or rows or products or activation_errors or ragged and float32 or 576 and cores or 13-bfloat16"
FILES = sorted(path.name for path in HERE.glob("test_interpreted_*.py"))


def run(file, folder):
    path = [os.path.abspath(folder) if folder else "", str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    command += ["-k", OLD] if folder else []
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def runs():
    """The interpreter takes one core and a minute a file: as many run at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {(file, folder): pool.submit(run, file, folder) for file in reversed(FILES) for folder in FOLDERS}


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: Path(folder).name or "installed")
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(runs, file, folder):
    done = runs[file, folder].result()
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_named_folders_hold_triton():
    for folder in FOLDERS[1:]:
        assert (Path(folder) / "triton" / "__init__.py").is_file(), f"ADAZETA_TEST_TRITON: no triton in {folder!r}"
