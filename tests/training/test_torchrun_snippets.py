"""Commands of the docs that start several processes run as they are printed, on a tiny model and one machine."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import SMALL, write_data, write_model

from adazeta.journal import NAME, read

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 300  # seconds
FEW_STEPS = [str(word) for word in (*SMALL, "--steps", 2, "--model", "base")]


def commands(page: str) -> list[list[str]]:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["torchrun"]]


@pytest.fixture
def here(tmp_path):
    write_model(tmp_path / "base")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    rows = write_data(tmp_path / "all.jsonl").read_text().splitlines(keepends=True)
    for rank in range(3):
        (tmp_path / f"shard-{rank}.jsonl").write_text("".join(rows[20 * rank : 20 * rank + 20]))
    lines = [re.search(r'"text": "(.*)", "label": "(.*)"', row).groups() for row in rows]
    (tmp_path / "reviews.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in lines))
    return tmp_path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder, words: list[str]) -> subprocess.Popen:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    return subprocess.Popen(command, cwd=folder, env={**os.environ, **settings}, stderr=subprocess.PIPE, text=True)


def wait(*processes: subprocess.Popen) -> None:
    for process in processes:
        _, err = process.communicate(timeout=LONGEST)
        assert process.returncode == 0, err


def test_processes_of_one_machine(here):
    one, _, restarted = commands("many-machines")
    for words in (one, restarted):
        wait(start(here, ["--master-port", str(free_port()), *words, *FEW_STEPS, "--overwrite"]))
        assert len(read(here / "runs" / "reviews" / NAME).steps) == 2
        assert (here / "runs" / "reviews" / "adapter_model.safetensors").is_file()


def test_processes_of_two_machines(here):
    _, words, _ = commands("many-machines")
    printed = words.index("first:29500")
    words[printed] = f"127.0.0.1:{free_port()}"
    wait(*(start(here, [*words, *FEW_STEPS]) for _ in range(2)))
    assert len(read(here / "runs" / "reviews" / NAME).steps) == 2


@pytest.mark.parametrize("which", range(2))
def test_clients(here, which):
    words = commands("private")[which]
    words = [{"MODEL": "base", "100": "2"}.get(word, word) for word in words]
    wait(start(here, ["--master-port", str(free_port()), *words]))
    assert len(read(here / "runs" / "federated" / NAME).steps) == 2
