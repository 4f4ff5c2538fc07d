"""Benchmarks are code: each runs once, on little data, so that `make bench` does not rot."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_benchmarks_run_and_record(tmp_path):
    result = tmp_path / "result.json"
    environment = os.environ | {"ADAZETA_BENCH_ELEMENTS": "5000", "ADAZETA_BENCH_ROUNDS": "1"}
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", f"--benchmark-json={result}"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    records = json.loads(result.read_text())["benchmarks"]
    names = {record["name"].split("[")[0] for record in records}
    assert {"bench_one_seed", "bench_many_seeds", "bench_many_tensors", "bench_tt_factors", "bench_tt_adapter"} <= names
    for record in records:
        info = record["extra_info"]
        assert info["bytes"] > 0
        assert info["percent_of_copy"] > 0
    page = tmp_path / "performance.md"
    page.write_text((ROOT / "docs" / "performance.md").read_text())
    subprocess.run([sys.executable, "benchmarks/report.py", str(result), str(page)], cwd=ROOT, check=True, timeout=60)
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(records)
    assert "How it is measured" in page.read_text()  # what is written by hand stays
