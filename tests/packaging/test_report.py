"""`benchmarks/report.py` replaces a table whole, so it wants results of all its rows."""

import copy
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def report(*files):
    command = [sys.executable, "benchmarks/report.py", *map(str, files)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_results_of_some_cases_are_refused_and_the_page_stays(tmp_path):
    """Rows of the tables that the results have not, which no file of results may hold any more."""
    whole = json.loads((ROOT / "benchmarks" / "results" / "epyc" / "kernels.json").read_text())
    again = copy.deepcopy(whole)
    adapters = [b for b in again["benchmarks"] if b["extra_info"].get("op") == "tt_adapter"]
    again["benchmarks"] = [b for b in adapters if b["extra_info"]["threads"] == 1 and "float32" in b["name"]]
    again["benchmarks"][0]["extra_info"]["native_ms"] = 98765.0
    parts = tmp_path / "whole.json", tmp_path / "again.json"
    for path, results in zip(parts, (whole, again)):
        path.write_text(json.dumps(results))
    page = tmp_path / "performance.md"
    page.write_text((ROOT / "docs" / "performance.md").read_text())
    before = page.read_text()

    refused = report(parts[1], page)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    lost = "`8x512x1024-64-r5` bfloat16 1", "`8x512x1024-64-r5` float32 2"
    assert all(words in refused.stderr for words in ("table tt_adapter", *lost, "name the files"))
    assert "`8x512x1024-64-r5` float32 1" not in refused.stderr
    assert page.read_text() == before

    assert report(*parts, page).returncode == 0
    assert page.read_text().count("| 98765 |") == 1
    assert len(page.read_text().splitlines()) == len(before.splitlines())
