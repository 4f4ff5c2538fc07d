"""Run folders: whole at every instant, left alone by others, and gone on with where a checkpoint is damaged."""

import os
import shutil
import signal

import pytest
from test_trainer import trainer
from tiny_run import main, train_command

from adazeta import files
from adazeta.files import put_back, put_in_place
from adazeta.progress import Bar
from adazeta.run_folders import close_partial, damage, open_partial, partial_of


def write(folder, text):
    folder.mkdir()
    (folder / "adazeta.json").write_text(text)
    return folder


def test_another_process_keeps_its_folder(tmp_path):
    run = tmp_path / "run"
    first = open_partial(run, resume=False, overwrite=True)
    (first.__enter__() / "adazeta.json").write_text("{}")
    close_partial(partial_of(run), run)
    second = open_partial(run, resume=False, overwrite=True)
    (second.__enter__() / "adazeta.json").write_text("{}")
    first.__exit__(None, None, None)  # it would have cleared what is not its own any more
    assert partial_of(run).is_dir()
    second.__exit__(None, None, None)
    assert not partial_of(run).exists() and run.is_dir()


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("call", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_death_while_a_run_replaces_another(tmp_path, monkeypatch, exchanges, call, number):
    """Where names can be exchanged a run is there at every instant; elsewhere once the folder is opened again."""
    run, partial = write(tmp_path / "run", "old"), write(tmp_path / "run.partial", "new")
    if not exchanges:
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    elif not files._exchanged(partial, run) or not files._exchanged(partial, run):
        pytest.skip("this file system does not exchange names")
    if exchanges and number == 2:
        pytest.skip("there is one rename, after the exchange")
    rename, calls = os.rename, []

    def deadly(source, target):
        calls.append(target)
        if len(calls) == number and call == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        os.rename = deadly
        put_in_place(partial, run)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    if exchanges:
        assert (run / "adazeta.json").read_text() == "new"
    with open_partial(run, resume=False, overwrite=True):
        text = (run / "adazeta.json").read_text()
        assert text == ("new" if exchanges or (number, call) == (2, "after") else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_a_living_process_put_aside_stays(tmp_path):
    write(tmp_path / f".run.old-{os.getpid()}", "old")
    put_back(tmp_path / "run")
    assert not (tmp_path / "run").exists() and (tmp_path / f".run.old-{os.getpid()}").is_dir()


def test_every_file_is_on_the_disk_before_the_old_run_goes(tmp_path, monkeypatch):
    run, partial = write(tmp_path / "run", "old"), write(tmp_path / "run.partial", "new")
    write(partial / "checkpoint-1", "state")
    synced, fsync, rmtree = set(), os.fsync, shutil.rmtree

    def noted(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def removed(path, **keywords):
        inside = {partial / "adazeta.json", partial / "checkpoint-1" / "adazeta.json", partial, tmp_path}
        assert {str(path) for path in inside} <= synced
        rmtree(path, **keywords)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(files.shutil, "rmtree", removed)
    put_in_place(partial, run)
    assert sorted(path.name for path in run.iterdir()) == ["adazeta.json", "checkpoint-1"]


def test_a_checkpoint_is_on_the_disk_when_it_is_made(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def noted(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", noted)
    trainer(tmp_path, max_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    assert {path.stat().st_ino for path in (tmp_path, checkpoint, *checkpoint.iterdir())} <= synced


@pytest.fixture(scope="module")
def interrupted(world):
    """A run that was stopped behind a checkpoint, and the folder it is in."""
    folder, _ = world
    on_log = Bar.on_log

    def interrupt(self, args, state, control, logs=None, **kwargs):
        on_log(self, args, state, control, logs=logs, **kwargs)
        if state.global_step == 8 and "loss" in (logs or {}):
            os.kill(os.getpid(), signal.SIGINT)

    from adazeta import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bar, "on_log", interrupt)
        assert cli.main([str(part) for part in train_command(folder, "stopped")]) == 130
    return folder


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_damage_of_many_kinds_is_seen(interrupted, tmp_path, name):
    newest = max(partial_of(interrupted / "stopped").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    checkpoint = shutil.copytree(newest, tmp_path / "checkpoint")
    content = (checkpoint / name).read_bytes()
    assert not damage(checkpoint)
    damaged = [b"", bytes(len(content)), content[:-9], content[: len(content) // 2]]
    if name.endswith("pt"):  # a number that torch would load, and a sign that only torch looks at
        for at in (content.index(b"step" if name == "optimizer.pt" else b"("), content.rindex(b"PK\x01\x02") + 34):
            damaged.append(content[:at] + bytes([content[at] ^ 0x11]) + content[at + 1 :])
    for bad in damaged:
        (checkpoint / name).write_bytes(bad)
        assert damage(checkpoint).startswith(f"{name}: ")


@pytest.mark.parametrize("name, how", [("optimizer.pt", "zeros"), ("scheduler.pt", "gone")])
def test_a_damaged_checkpoint_is_passed_by(interrupted, tmp_path, capsys, name, how):
    run = tmp_path / "run"
    partial = shutil.copytree(partial_of(interrupted / "stopped"), partial_of(run))
    checkpoint = max(partial.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(bytes(len(content))) if how == "zeros" else (checkpoint / name).unlink()
    code, out, err = main(capsys, "train", "--output", run, "--resume")
    assert code == 0 and f"{checkpoint.name} is damaged ({name}: " in err, err
    undisturbed = interrupted / "run" / "adapter_model.safetensors"
    assert (run / "adapter_model.safetensors").read_bytes() == undisturbed.read_bytes()
