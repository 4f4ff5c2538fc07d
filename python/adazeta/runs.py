"""Run folders: what is in them, how a model is loaded, and how one is trained, evaluated and asked.

A run folder holds the adapter as PEFT saves it, ``adazeta.json`` (the card: base model, task, settings),
``journal.azj``, ``metrics.jsonl``, ``summary.json`` and ``curves.png``. How it comes to be: :mod:`adazeta.run_folders`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adazeta import __version__
from adazeta.base_models import Say, architecture, load_base, model_folder
from adazeta.errors import UserError
from adazeta.files import write_text
from adazeta.gguf_models import gguf_file
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

    The folder may come from anywhere: no module is made before its settings ask for what is stored, and no more.

    Raises:
        UserError: not an adapter folder, or one that is damaged, of another method or belongs to another model.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    from adazeta.stored_adapter import check_settings, check_shapes
    from adazeta.tuner import TTConfig
    from adazeta.tuner.places import saved_shapes

    folder = Path(folder)
    path, about = folder / ADAPTER, folder / "adapter_config.json"
    if not about.is_file() or not path.is_file():
        raise UserError(f"{folder} is not an adapter folder (no adapter_config.json and {ADAPTER})")
    check_settings(read_json(about), about)
    try:
        with safe_open(path, framework="pt") as stored:
            saved = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        config = TTConfig.from_pretrained(str(folder))
        check_shapes(saved, saved_shapes(model, config))
        adapted = PeftModel.from_pretrained(model, str(folder), config=config)
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
    if folder.is_dir() and not run and not (folder / "config.json").is_file() and gguf_file(folder) is None:
        raise UserError(f"{name} is neither a run (no {CARD}) nor a model folder (no config.json, no GGUF file)")
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
        """Return the examples as rows of tokens, encoded once; ``say`` is told of texts that lose their end.

        Prompts are cut to ``task.max_tokens``, or to what the model has positions for, with the answers behind them.

        Raises:
            UserError: what the task cannot encode, or a token that the model does not know.
        """
        from adazeta.data import row_tokens
        from adazeta.positions import most_positions
        from adazeta.scoring import trunk_of

        task, most, seq2seq = self.task, most_positions(self.model), self.model.config.is_encoder_decoder
        behind = getattr(self.loss(), "tokens_behind", 0) if most is not None else 0
        while True:
            told: list[str] = []
            rows = task.encode(self.tokenizer, examples, seq2seq=seq2seq, say=told.append)
            longest = max(map(row_tokens, rows)) + behind
            if most is None or longest <= most:
                break
            task = replace(task, max_tokens=min(task.max_tokens, longest) - (longest - most))
        if task is not self.task:
            instead = f"--max-tokens is {task.max_tokens} instead of {self.task.max_tokens}"
            told = [f"the model has {most} positions: {instead}; {'; '.join(told)}"]
        for line in told:
            say(line)
        known = trunk_of(self.model).get_input_embeddings().num_embeddings
        if (highest := max(_highest(row["input_ids"]) for row in rows)) >= known:
            raise UserError(
                f"the tokenizer makes {self.tokenizer.convert_ids_to_tokens(highest)!r} token {highest}, the model "
                f"knows {known} (0 to {known - 1}): the two do not belong together"
            )
        return rows

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


def _highest(ids) -> int:
    """Return the highest number in a list of tokens, or of such lists."""
    return max((_highest(part) if isinstance(part, list | tuple) else int(part) for part in ids), default=0)
