"""The table of compiled Triton kernels is the one that its JSON makes, and the JSON is of the kernels there are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "compiled" / "triton.json"
PAGE = ROOT / "docs" / "performance.md"


def write(result, page):
    command = [sys.executable, "benchmarks/report_compiled.py", str(result), str(page)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def test_the_page_shows_the_committed_figures(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(PAGE.read_text())
    assert write(RESULT, page).returncode == 0
    assert page.read_text() == PAGE.read_text()


def test_a_table_has_the_most_of_each_group(tmp_path):
    numbers = (("op rank=16 a", 10, 1024), ("op rank=16 b", 20, 512), ("op rank=32 a", 5, 0), ("other", 7, 2048))
    kernels = [
        {"name": name, "target": target, "registers": registers + more, "spills": more, "shared": shared}
        for name, registers, shared in numbers
        for target, more in (("sm_80", 0), ("gfx942", 4))
    ]
    origin = {"commit": "0123456789", "changed_files": [], "triton": "3", "ptxas": "12", "ptxas_blackwell": "13"}
    result, page = tmp_path / "triton.json", tmp_path / "page.md"
    result.write_text(json.dumps(origin | {"kernels": kernels}))
    page.write_text("before\n<!-- triton_compiled -->\nold\n<!-- end triton_compiled -->\nafter\n")
    assert write(result, page).returncode == 0
    text = page.read_text()
    assert "| `op rank 16` | 2 | 20, 1 KiB | 24, 1 KiB | 8 |" in text and "| `op rank 32` | 1 | 5, 0 KiB |" in text
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text and "commit 0123456." in text
    page.write_text("no markers")
    assert "expected one <!-- triton_compiled -->" in write(result, page).stderr
    assert page.read_text() == "no markers"


def test_every_kernel_is_in_the_committed_figures():
    pytest.importorskip("triton", reason="lists kernels, which needs the package triton")
    code = """
import importlib, sys
sys.path.insert(0, "tests/kernels/triton_backend")
import aot
for module in aot.MODULES:
    for specimen in importlib.import_module(f"adazeta_kernels.backends.triton.{module}").specimens():
        for target in aot.TARGETS:
            print(specimen.name, target, sep=";")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(RESULT.read_text())
    assert {f"{kernel['name']};{kernel['target']}" for kernel in result["kernels"]} == set(run.stdout.splitlines())
    assert not any(kernel["spills"] for kernel in result["kernels"])
