"""Run folders: what is in them, how a model is loaded, and how one is trained, evaluated and asked.

A run folder holds the adapter as PEFT saves it, ``adazeta.json`` (the card: base model, task, settings),
``journal.azj``, ``metrics.jsonl``, ``summary.json`` and ``curves.png``. Training writes to ``<folder>.partial``, which
takes the folder's place when everything is written: a run folder is whole or it is not there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adazeta import __version__
from adazeta.base_models import Say, architecture, load_base, model_folder
from adazeta.errors import UserError
from adazeta.files import disk_errors, put_in_place, write_text
from adazeta.option import plain
from adazeta.tasks import Task, choose, from_dict, to_dict

CARD, ADAPTER, METRICS, SUMMARY, CURVES = (
    "adazeta.json",
    "adapter_model.safetensors",
    "metrics.jsonl",
    "summary.json",
    "curves.png",
)


def read_json(path: Path) -> dict:
    """Read a JSON object; UserError where it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): train again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (not a JSON object): train again")
    return content


def read_metrics(path: Path) -> list[dict]:
    """Read ``metrics.jsonl``; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]


def write_json(path: Path, content: dict) -> None:
    """Write a JSON object, aside then renamed."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def is_run(folder: str | Path) -> bool:
    """Return whether the folder is a run: it has a card."""
    return (Path(folder) / CARD).is_file()


def read_card(folder: str | Path) -> dict:
    """Return the card of a run folder.

    Raises:
        UserError: no such folder, not a run, or a damaged card.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no such run folder: {folder}; train one with `adazeta train --output {folder}`")
    if not is_run(folder):
        raise UserError(f"{folder} is not a run folder (it has no {CARD}): give the --output of `adazeta train`")
    card = read_json(folder / CARD)
    missing = [key for key in ("base_model", "task") if key not in card]
    if missing:
        raise UserError(f"{folder / CARD} is damaged (no {missing[0]!r}): train again")
    return card


def attach_adapter(model, folder: str | Path):
    """Return ``model`` with the trained adapter of a run or PEFT folder, frozen and in evaluation mode.

    Raises:
        UserError: not an adapter folder, or one that is damaged or belongs to another model.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    import adazeta.tuner  # noqa: F401  registers the method with PEFT

    folder = Path(folder)
    path = folder / ADAPTER
    if not (folder / "adapter_config.json").is_file() or not path.is_file():
        raise UserError(f"{folder} is not an adapter folder (no adapter_config.json and {ADAPTER})")
    try:
        with safe_open(path, framework="pt") as stored:
            saved = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (SafetensorError, OSError, EOFError) as error:
        raise UserError(f"{path} is damaged or cut off: rebuild it with `adazeta replay {folder} --write`") from error
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:  # wrong kinds of settings too
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"the adapter in {folder} does not fit the base model: {reason}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(adapted).items()}
    if saved != expected:
        different = sorted(name for name in saved.keys() | expected.keys() if saved.get(name) != expected.get(name))
        raise UserError(f"the adapter in {folder} does not fit the base model: {different[0]} differs or is missing")
    return adapted.eval()


def card_for(name: str, journal: str | None = None) -> dict:
    """Return what a run folder, or the journal that is used with it, says of base model, task and dtype.

    Of a base model only its name is known; a journal's base model is the run's or ``name`` itself.
    """
    run, folder = is_run(name), Path(name)
    if folder.is_dir() and not run and not (folder / "config.json").is_file():
        raise UserError(f"{name} is neither a run (no {CARD}) nor a model folder (no config.json)")
    card = read_card(name) if run else {"base_model": str(name)}
    if journal is None:
        return card
    from adazeta.journal import read
    from adazeta.journal_tools import journal_path

    about = read(journal_path(journal), repair=True).header["about"]
    return {**about, "base_model": card["base_model"]}


def own_task(card: dict, where: str | Path) -> Task | None:
    """Return the task of a card, None where it has none; ``UserError`` names ``where`` if it describes no task."""
    if not card.get("task"):
        return None
    try:
        return from_dict(card["task"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where} is damaged (task: {error}): train again") from error


@dataclass
class Classifier:
    """A model that answers: the adapted or plain model, its tokenizer and the task."""

    model: Any
    tokenizer: Any
    task: Task
    card: dict

    @classmethod
    def open(
        cls,
        name: str,
        *,
        task: Task | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        journal: str | None = None,
        device: str = "auto",
        say: Say = lambda line: None,
    ) -> Classifier:
        """Open a run folder (base model and task from its card) or a base model (``task``, by default sentiment).

        With ``journal``, a run folder or a journal file, the adapter is the one that the journal makes; task, dtype and
        quantization are those it was trained with, if no others are given.
        """
        card = card_for(name, journal)
        base = card["base_model"]
        task = task or own_task(card, journal or name) or default_task(base, say)
        stored = {"dtype": dtype or card.get("dtype") or "float32", "quantize": quantize or card.get("quantize")}
        model, tokenizer = load_base(base, task=task, device=device, **stored, say=say)
        if journal is not None:
            from adazeta.journal_tools import adapter_from_journal

            model, _ = adapter_from_journal(model, journal)
        elif is_run(name):
            model = attach_adapter(model, name)
        return cls(model, tokenizer, task, card)

    def collator(self):
        """Return the collator for this tokenizer's padding token."""
        from adazeta.data import RightPad

        return RightPad(self.tokenizer.pad_token_id or 0)

    def loss(self):
        """Return the task's fp32 loss per row."""
        try:
            return self.task.loss(self.model, self.tokenizer)
        except ValueError as error:
            raise UserError(f"task {self.task.kind}: {error}") from error

    def encode(self, examples: Sequence, say: Say = lambda line: None):
        """Return the examples as rows of tokens, encoded once; ``say`` is told of texts that lose their end."""
        return self.task.encode(self.tokenizer, examples, seq2seq=self.model.config.is_encoder_decoder, say=say)

    def evaluate(
        self,
        examples: Sequence,
        *,
        batch_size: int = 32,
        progress=None,
        say: Say = lambda line: None,
        measures=None,
    ) -> dict:
        """Return accuracy, mean loss, what ``measures`` has, predictions and probabilities on labelled examples."""
        from adazeta.evaluate import evaluate

        rows = self.encode(examples, say)
        return evaluate(self.model, self.loss(), rows, self.collator(), batch_size, progress, measures)

    def probabilities(
        self, examples: Sequence, *, batch_size: int = 32, say: Say = lambda line: None
    ) -> list[list[float]]:
        """Return the probability of every class (or candidate) for every example, whatever its label, or text."""
        from adazeta.examples import Example

        examples = [Example(e, "") if isinstance(e, str) else e for e in examples]
        some = [replace(e, label=e.choices[0] if self.task.labels is None else self.task.labels[0]) for e in examples]
        return self.evaluate(some, batch_size=batch_size, say=say)["probabilities"]


def default_task(base: str, say: Say = lambda line: None) -> Task:
    """Return the task of a base model of which nothing else is known: sentiment by label words.

    Raises:
        UserError: the model has no language-model head.
    """
    kind = architecture(model_folder(base, say))
    if kind in ("head", "encoder"):
        raise UserError(f"{base} has no language-model head: train a classification head on it with `adazeta train`")
    return choose({}, kind)


def partial_of(output: str | Path) -> Path:
    """Return the folder that training writes to until ``output`` is whole."""
    output = Path(output)
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
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: choose another --output")
    if output.is_dir() and any(output.iterdir()) and not is_run(output):
        raise UserError(f"{output} is not empty and not a run folder: choose another --output")
    if resume:
        if not resumable(partial):
            done = " (it is complete)" if is_run(output) else ""
            raise UserError(f"nothing to resume for {output}{done}: leave --resume out to train anew")
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
        try:
            yield partial
        finally:
            if partial.is_dir() and not resumable(partial):
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


def resumable(folder: Path) -> bool:
    """Return whether there is something to go on with: a checkpoint, or a journal with a step (or one to look at)."""
    from adazeta.errors import JournalError
    from adazeta.journal import NAME, read

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
    return older[-1] if older else None


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


def card_of(settings: Mapping[str, Any], task: Task, preset: str) -> dict:
    """Return the card of a run: what another process needs to use the adapter, and what made it."""
    base = settings["model"]
    return {
        "format": 1,
        "adazeta": __version__,
        "base_model": str(Path(base).resolve()) if Path(base).is_dir() else base,
        "dtype": settings["dtype"],
        "quantize": settings["quantize"],
        "task": to_dict(task),
        "preset": preset,
        "settings": {key: plain(value) for key, value in settings.items()},
    }
