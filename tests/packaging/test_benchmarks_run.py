"""Benchmarks are code: each runs once, on little data, so that `make bench` does not rot."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_benchmarks_run_and_record(tmp_path):
    result = tmp_path / "result.json"
    # A suite in several processes leaves a variable that turns benchmarks off.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"ADAZETA_BENCH_ELEMENTS": "5000", "ADAZETA_BENCH_ROUNDS": "1"}
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", f"--benchmark-json={result}"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    records = json.loads(result.read_text())["benchmarks"]
    names = {record["name"].split("[")[0] for record in records}
    assert {"bench_one_seed", "bench_many_seeds", "bench_many_tensors", "bench_tt_factors", "bench_tt_adapter"} <= names
    assert {"bench_step", "bench_padding", "bench_upper_quarter"} <= names
    ops = Counter(record["extra_info"].get("op", "perturb_") for record in records)
    for record in records:
        info = record["extra_info"]
        if info.get("op") in ("step", "padding", "upper_quarter"):
            continue
        assert info["bytes"] > 0
        assert info["percent_of_copy"] > 0
    check_steps([record["extra_info"] for record in records if record["extra_info"].get("op") == "step"])

    page = tmp_path / "performance.md"
    lines = (ROOT / "docs" / "performance.md").read_text().splitlines(keepends=True)
    page.write_text("".join(line for line in lines if not line.startswith("| `")))  # tables without rows
    # A case alone, measured again: the table keeps the others.
    again, whole = tmp_path / "again.json", json.loads(result.read_text())
    step = next(record for record in whole["benchmarks"] if record["extra_info"].get("op") == "step")
    step["extra_info"]["ours_ms"] = 98765.0
    again.write_text(json.dumps({**whole, "benchmarks": [step]}))
    report = [sys.executable, "benchmarks/report.py", str(result), str(again), str(page)]
    subprocess.run(report, cwd=ROOT, check=True, timeout=300)
    text = page.read_text()
    for op, count in {**ops, "step_split": ops["step"]}.items():
        section = text.split(f"<!-- {op} -->")[1].split(f"<!-- end {op} -->")[0]
        assert sum(line.startswith("| `") for line in section.splitlines()) == count, op
    assert text.count("| 98765 |") == 1
    assert "How it is measured" in text  # what is written by hand stays
    assert (tmp_path / "images" / "step-cost.png").read_bytes().startswith(b"\x89PNG")


def check_steps(steps):
    """Every model was compared and timed, and every part of the split was found by name."""
    assert {step["model"] for step in steps} == {"llama-12l", "roberta-large", "opt-125m"}
    for step in steps:
        assert step["apart"] < 0.25
        assert min(step["ours_ms"], step["published_ms"], step["floor_ms"]) > 0
        parts = ("base", "adapters", "factors", "head", "update", "journal", "host")
        shares = {part: step[f"split_{part}"] for part in parts}
        assert min(shares.values()) > 0, shares
        assert abs(sum(shares.values()) - 100) < 0.1, shares
    peaks = [step for step in steps if "peak_ours_mib" in step]
    assert peaks and all(step["peak_published_mib"] >= 0 for step in peaks)
