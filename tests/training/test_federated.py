"""Clients that hold their data: the example over torchrun ends with one theta everywhere."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

from tiny_run import write_data, write_model

from adazeta.journal import NAME, read
from adazeta.replay import replay

ROOT = Path(__file__).resolve().parents[2]


def test_clients_end_with_the_same_numbers_and_the_journal_rebuilds_them(tmp_path):
    write_model(tmp_path / "base")
    rows = write_data(tmp_path / "all.jsonl", 20).read_text().splitlines(keepends=True)
    for rank in range(2):
        (tmp_path / f"shard-{rank}.jsonl").write_text("".join(rows[10 * rank : 10 * rank + 10]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [ROOT / "examples" / "federated.py", "--model", tmp_path / "base", "--output", tmp_path / "run"]
    command += ["--data", f"{tmp_path}/shard-{{rank}}.jsonl", "--steps", "3", "--batch-size", "2", "--queries", "2"]
    command += ["--noise", "2", "--delta", "0.01"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"client \d: 10 examples, theta ([0-9a-f]{16})", done.stdout)
    assert len(found) == 2 and len(set(found)) == 1, done.stdout
    steps = read(tmp_path / "run" / NAME).steps
    assert len(steps) == 3 and all(math.isnan(step.loss) for step in steps)
    assert done.stdout.count("at delta 0.01") == 2
    assert replay(tmp_path / "run").step == 3
