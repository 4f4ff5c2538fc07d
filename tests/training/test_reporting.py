"""What a run says to others: the names of its metrics, TensorBoard's files, W&B's, services that are not installed."""

import json
import os
import struct
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from test_trainer import trainer
from tiny_run import adazeta, fails, main, train_command

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


def sent(folder):
    """What W&B keeps of a run for when it gets online: config, and the history's steps of every name."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.rglob("run-*.wandb")
    content, at, whole = path.read_bytes(), 7, b""  # a head, then blocks of 32 KiB
    config, history = {}, {}
    while at + 7 <= len(content):
        if (left := -at % 32768) < 7:  # no head of a part would fit
            at += left
            continue
        length, kind = struct.unpack_from("<4xHB", content, at)  # its checksum, length, the place in its record
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of it, or the last part
            record, whole = Record.FromString(whole), b""
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
            line = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for name in line:
                history.setdefault(name, []).append(line["train/global_step"])
    return config, history


@pytest.mark.skipif(not find_spec("wandb"), reason="wandb is not installed: W&B's own package, 62 MB and what it needs")
def test_wandb_hears_what_metrics_jsonl_holds(world, tmp_path):
    folder, _ = world
    command = train_command(folder, "heard", "--steps", 3, "--report-to", "wandb")
    done = adazeta(*command, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    config, history = sent(tmp_path)
    assert config["adazeta"]["eps"] == 0.01 and config["learning_rate"] == 0.01
    assert all(history[f"train/{name}"] == [1, 2, 3] for name in NAMES)
    assert history["eval/loss"] == history["eval/accuracy"] == [0, 1, 2, 3]
    done = adazeta(*command, "--overwrite", WANDB_MODE="online", WANDB_API_KEY="short", WANDB_DIR=str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "adazeta: error: --report-to wandb: WANDB_API_KEY invalid" in done.stderr
    assert (folder / "heard").is_dir() and not (folder / "heard.partial").exists()


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
