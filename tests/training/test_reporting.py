"""What a run says to others: the names of its metrics, TensorBoard's files, services that are not installed."""

import json
import os
import struct
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from test_trainer import trainer
from tiny_run import fails, main, train_command

from adazeta import ZOConfig, kinds
from adazeta.journal import NAME, steps
from adazeta.progress import read_metrics

NAMES = {"loss", "zo/queries", "zo/projected_grad_std", "zo/snr", "rows_per_second", "peak_mib"}


def scalars(folder):
    """Tag -> steps of every scalar in a folder of TensorBoard's event files."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.rglob("events.out.tfevents.*"):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)  # length, its checksum, the event, its checksum
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    found.setdefault(value.tag, []).append(event.step)
    return found


def test_logs_have_the_fields_names(tmp_path):
    run = trainer(tmp_path, max_steps=2)
    run.train()
    first, second, _ = run.state.log_history
    assert first.keys() == second.keys() > NAMES
    assert 50 < first["peak_mib"] < 100_000 and first["zo/snr"] > 0
    assert [first["zo/projected_grad_std"], second["zo/projected_grad_std"]] == [
        s.spread for s in steps(tmp_path / NAME)
    ]
    forward = trainer(tmp_path / "forward", max_steps=1, zo=ZOConfig(eps=0.05, queries=2, difference="forward"))
    forward.train()
    assert "zo/snr" not in forward.state.log_history[0]  # one loss a query tells no slope from rounding


def test_tensorboard_reads_what_metrics_jsonl_holds(world, capsys):
    if not find_spec("tensorboardX"):
        pytest.skip("tensorboardX is not installed")
    folder, _ = world
    code, _, err = main(capsys, *train_command(folder, "board", "--steps", 3, "--report-to", "tensorboard"))
    assert code == 0, err
    lines = [line for line in read_metrics(folder / "board" / "metrics.jsonl") if line["kind"] == "train"]
    assert all(NAMES <= line.keys() for line in lines)
    found = scalars(folder / "board")
    assert all(found[f"train/{name}"] == [1, 2, 3] for name in NAMES)
    assert {"eval/loss", "eval/accuracy"} <= found.keys()
    assert json.loads((folder / "board" / "adazeta.json").read_text())["settings"]["report_to"] == ["tensorboard"]


def test_services_that_cannot_be_reported_to(world, capsys, monkeypatch):
    folder, _ = world
    monkeypatch.setattr(kinds, "find_spec", lambda package: None)
    for service, message in (
        ("wandb", "--report-to: wandb needs a package that is not installed: pip install wandb"),
        ("tensorboard", "pip install tensorboardX"),
        ("carrier-pigeon", "expected tensorboard, wandb or none, got 'carrier-pigeon'"),
    ):
        assert message in fails(capsys, *train_command(folder, "x", "--report-to", service))
    assert kinds.services("none") == [] and not (folder / "x.partial").exists()


def test_a_run_is_pushed_to_the_hub(world, capsys, monkeypatch):
    import huggingface_hub

    done = []

    class Hub:
        def __init__(self, token):
            assert token is None  # the one that is logged in

        def create_repo(self, name, private, exist_ok):
            done.append((name, private, exist_ok))
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, repo_id, folder_path, **_):
            if repo_id == "nobody/else":
                raise ConnectionError("Cannot reach\nthe hub")
            done.append((repo_id, "adapter_model.safetensors" in os.listdir(folder_path)))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    run = world[0] / "run"
    assert main(capsys, "push", run, "me/tuned", "--private")[0] == 0
    assert main(capsys, "push", run, "me/open")[0] == 0
    assert done == [("me/tuned", True, True), ("me/tuned", True), ("me/open", None, True), ("me/open", True)]
    assert "(log in with `hf auth login`): Cannot reach the hub" in fails(capsys, "push", run, "nobody/else")
    assert "is not a run folder" in fails(capsys, "push", world[0] / "base", "me/tuned")
