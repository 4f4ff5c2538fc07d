"""The folder that a run is written to, and how it takes the place of an earlier one.

Training writes to ``<folder>.partial``, which takes the folder's place when everything is written: a run folder is
whole or it is not there. One process at a time holds it; what an interrupted run left in it can be gone on with.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adazeta.base_models import Say
from adazeta.errors import UserError
from adazeta.files import REPLACED, disk_errors, put_back, put_in_place
from adazeta.runs import ADAPTER, CARD, METRICS, is_run

#: File systems take 255 bytes; an output's name is also part of longer ones, while runs are written.
_LONGEST_NAME = 230


def partial_of(output: str | Path) -> Path:
    """Return the folder that training writes to until ``output`` is whole.

    Raises:
        UserError: ``output`` is ``.`` or the like, whose place nothing can take, or too long for names made of it.
    """
    output = Path(output)
    if output.name in ("", ".."):
        raise UserError(f"--output must name a folder that the run can take the place of, got {str(output)!r}")
    if (length := len(os.fsencode(output.name))) > _LONGEST_NAME:
        raise UserError(f"--output must be a name of at most {_LONGEST_NAME} bytes, got one of {length}")
    return output.with_name(f"{output.name}.partial")


@contextmanager
def open_partial(output: str | Path, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Yield the folder that training writes to, ``<output>.partial``, empty unless the run is resumed.

    It goes when the block fails, unless there is something in it to resume. One process at a time holds it.

    Raises:
        UserError: ``output`` holds a run (and not ``overwrite``) or something else, or ``<output>.partial`` does, there
            is nothing to resume, or another process trains there.
    """
    output = Path(output)
    partial = partial_of(output)
    put_back(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: choose another --output")
    if output.is_dir() and any(output.iterdir()) and not is_run(output):
        raise UserError(f"{output} is not empty and not a run folder: choose another --output")
    if resume:
        check_resumable(output)
    else:
        if not overwrite and is_run(output):
            raise UserError(f"{output} holds a run already: add --overwrite, or choose another --output")
        if not overwrite and resumable(partial):
            raise UserError(f"{partial} holds an interrupted run: add --resume to go on, or --overwrite to start anew")
        with disk_errors(partial):
            partial.mkdir(parents=True, exist_ok=True)
    with _alone(partial):
        if not resume:
            if any(partial.iterdir()) and not _of_a_run(partial):
                raise UserError(f"{partial} is not empty and not an unfinished run: choose another --output")
            for path in partial.iterdir():  # the folder itself stays: it is locked
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        locked = partial.stat().st_ino
        try:
            yield partial
        finally:  # a finished folder has left; what is there by now may be another process's
            if partial.is_dir() and partial.stat().st_ino == locked and not resumable(partial):
                shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that exists."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another process trains into {folder}: wait for it or stop it, or choose another --output"
            ) from error
        if not folder.is_dir() or os.fstat(descriptor).st_ino != folder.stat().st_ino:
            raise UserError(f"another process has just finished or removed {folder}: run the command again")
        yield
    finally:
        os.close(descriptor)


def _of_a_run(folder: Path) -> bool:
    """Return whether training wrote to the folder, however soon it ended."""
    from adazeta.journal import NAME

    # A process that is killed before it renames its first file leaves the temporary one.
    written = [name for own in (CARD, METRICS, NAME, "journal-initial*.safetensors") for name in (own, f".{own}.*.tmp")]
    return any(path.is_file() for name in written for path in folder.glob(name)) or any(folder.glob("checkpoint-*"))


def check_resumable(output: Path) -> None:
    """Raise UserError where there is nothing of the run ``output`` to go on with."""
    if not resumable(partial_of(output)):
        done = " (it is complete)" if is_run(output) else ""
        raise UserError(f"nothing to resume for {output}{done}: leave --resume out to train anew")


def resumable(folder: Path) -> bool:
    """Return whether there is something to go on with: a checkpoint, or a journal with a step (or one to look at)."""
    from adazeta.errors import JournalError
    from adazeta.journal import NAME, read

    if (folder / REPLACED).exists():  # an earlier run, of which only the name was left
        return False
    if checkpoints(folder):
        return True
    if not (folder / NAME).is_file():
        return False
    try:
        return bool(read(folder / NAME, repair=True).steps)
    except JournalError:
        return True


def resume_from(folder: Path, say: Say = lambda line: None) -> Path | None:
    """Return the newest checkpoint that is not newer than the journal, or None: the journal makes all steps again.

    Raises:
        UserError: the journal is missing or damaged.
    """
    from adazeta.journal import NAME, read

    steps = len(read(folder / NAME, repair=True).steps)
    found = checkpoints(folder)
    older = [path for path in found if int(path.name.removeprefix("checkpoint-")) <= steps]
    if len(older) < len(found):
        say(f"{found[-1].name} is newer than the journal ({steps:,} steps), which was cut short: going on from there")
    while older and (reason := damage(older[-1])):
        say(f"{older.pop().name} is damaged ({reason}): the journal makes its steps again")
    return older[-1] if older else None


def damage(checkpoint: Path) -> str:
    """Return what of a checkpoint's files is missing or cannot be read, or ``""``."""
    import torch
    from safetensors import safe_open
    from transformers.trainer import safe_globals

    for name in (ADAPTER, "optimizer.pt", "scheduler.pt", *(path.name for path in checkpoint.glob("rng_state*.pth"))):
        try:
            if name == ADAPTER:
                with safe_open(checkpoint / name, framework="pt"):
                    continue
            with zipfile.ZipFile(checkpoint / name) as archive:  # torch looks at no checksum of what it loads
                if wrong := archive.testzip():
                    return f"{name}: {wrong} has another checksum"
            with safe_globals():
                torch.load(checkpoint / name, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes bring both readers to errors of many kinds
            return f"{name}: {' '.join(str(error).split())[:100] or type(error).__name__}"
    return ""


def checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints of an unfinished run, oldest first; the Trainer writes their state file last."""

    def whole(path: Path) -> bool:
        try:
            return bool(json.loads((path / "trainer_state.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return False

    numbered = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(filter(whole, numbered), key=lambda path: int(path.name.removeprefix("checkpoint-")))


def close_partial(partial: Path, output: str | Path) -> None:
    """Put the finished folder in the place of ``output``; an earlier run there goes only then."""
    output = Path(output)
    with disk_errors(output):
        put_in_place(partial, output)
