"""The benchmark of launch overhead runs, and tells what it left out."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_bench_launch_runs_and_records(tmp_path):
    result = tmp_path / "launch.json"
    command = [sys.executable, "benchmarks/bench_launch.py", "--calls", "2", "--repeats", "1", "--json", str(result)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(result.read_text())
    assert len(found["microseconds"]) == 7
    for case, times in found["microseconds"].items():
        assert times["native"] > 0
        assert ("triton" in times) != ("triton" in found["left_out"][case])
        assert case in run.stdout
