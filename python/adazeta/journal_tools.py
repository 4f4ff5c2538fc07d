"""``adazeta replay`` and ``adazeta journal``: a run done again and compared, what it recorded, where two runs part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .devices import chosen_device
from .digests import base_sha256, json_sha256, sha256_of
from .errors import JournalError, UserError
from .files import replacing
from .journal import read
from .privacy import Privacy
from .replay import effective, journal_path, replay
from .report import facts
from .runs import ADAPTER, CARD
from .tuner import TTConfig

_CHECKPOINT = "checkpoint-"


def replay_run(
    name: Path,
    at: int | None = None,
    *,
    verify: str | None = None,
    write: bool = False,
    device: str = "cpu",
    backend: str | None = None,
) -> tuple[str, bool]:
    """Rebuild a run's adapter from its journal; return a line to print and whether the one it is compared with agrees.

    Args:
        name: run folder, or a journal.
        at: steps to do; all by default, or the step of the checkpoint that ``verify`` names.
        verify: adapter file, run folder or checkpoint to compare with; by default the run's saved adapter, if all steps
            are done and it is there.
        write: put the rebuilt adapter in the place of the saved one (a damaged one, say).
        device, backend: where and by which backend the numbers are computed.

    Raises:
        UserError: not a run, a damaged journal, or a damaged adapter (and not ``write``).
    """
    if not name.exists():
        raise UserError(f"no such run folder: {name}")
    path = journal_path(name)
    if not path.is_file():
        raise UserError(f"{name} has no journal ({path.name}): it is not a run folder (those have {CARD} too)")
    folder = path.parent
    compared = Path(verify) if verify else folder / ADAPTER
    if verify and at is None and compared.name.startswith(_CHECKPOINT):
        number = compared.name.removeprefix(_CHECKPOINT)
        at = int(number) if number.isdigit() else None
    if compared.is_dir():
        compared = compared / ADAPTER
    chosen_device(device)
    try:
        run = replay(path, at, device=device, backend=backend)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"replay on {device} by {backend or 'any backend'}: {error}") from error  # named, cannot run
    rebuilt = {key: tensor.cpu() for key, tensor in run.tensors.items()}
    numbers = sum(tensor.numel() for tensor in rebuilt.values())
    digest = sha256_of([rebuilt[key] for key in sorted(rebuilt)])[:16]
    done = f"{name}: {run.step:,} steps replayed, {numbers:,} numbers, SHA-256 {digest}..."
    if write:
        with replacing(folder / ADAPTER) as temporary:
            tensors = {key: tensor.contiguous().clone() for key, tensor in rebuilt.items()}
            save_file(tensors, temporary, metadata={"format": "pt"})
        return f"{done}: written to {folder / ADAPTER}", True
    if not verify and (at is not None or not name.is_dir()):
        return done, True
    try:
        saved = load_file(compared)
    except (SafetensorError, OSError) as error:
        advice = "" if verify else f": rebuild it with `adazeta replay {name} --write`"
        raise UserError(f"{compared} is missing, damaged or cut off{advice}") from error
    different = [
        key
        for key in sorted(saved.keys() | rebuilt.keys())
        if key not in saved or key not in rebuilt or not torch.equal(saved[key], rebuilt[key].to(saved[key].dtype))
    ]
    what = f"{compared}" if verify else "the saved adapter"
    if different:
        return f"{done}: {len(different)} of {len(saved)} tensors differ from {what} ({different[0]})", False
    return f"{done}: equal to {what}, bit for bit", True


def adapter_from_journal(model, journal: str | Path):
    """Return ``model`` with the adapter that a journal makes, frozen, and what its header says about the run.

    Raises:
        UserError: no journal, a damaged one, one of another base model, or one without an adapter.
    """
    path = journal_path(journal)
    run = replay(path, repair=True)
    if run.header["adapter"] is None:
        raise JournalError(f"{path} records the training of a whole model, not of an adapter", key="adapter")
    settings = {key: value for key, value in run.header["adapter"].items() if key != "peft_type"}
    try:
        adapted = peft.get_peft_model(model, TTConfig(**settings))
    except (ValueError, TypeError) as error:
        raise JournalError(f"the adapter of {path} does not fit the base model: {error}", key="adapter") from error
    trained = [p for p in adapted.parameters() if p.requires_grad]
    if base_sha256(adapted, trained) != run.header["base_sha256"]:
        raise JournalError(f"{path} belongs to another base model: its weights differ", key="base_sha256")
    expected = peft.get_peft_model_state_dict(adapted)
    different = sorted(
        name
        for name in expected.keys() | run.tensors.keys()
        if name not in expected or name not in run.tensors or expected[name].shape != run.tensors[name].shape
    )
    if different:
        raise JournalError(f"the adapter of {path} does not fit the base model: {different[0]} differs", key="sites")
    with torch.no_grad():
        peft.set_peft_model_state_dict(adapted, run.tensors)
    return adapted.requires_grad_(False).eval(), run.header["about"]


def statistics(name: str) -> dict[str, Any]:
    """Return what the journal of a run (or a journal file) records, as JSON values."""
    path = journal_path(name)
    found = read(path, repair=True)
    header, steps = found.header, found.steps
    kept = effective(steps)
    losses = [step.loss for step in kept if step.loss == step.loss]
    few = max(1, len(losses) // 10)
    coefficients = np.concatenate([np.asarray(s.coefficients, np.float64) for s in kept]) if kept else np.zeros(0)
    return {
        "journal": str(path),
        "bytes": found.ends[-1] + found.torn,
        "torn_bytes": found.torn,
        "steps": len(steps),
        "steps_in_effect": len(kept),
        "rollbacks": sum(step.back_to is not None for step in steps),
        "queries": sum(len(step.coefficients) for step in steps),
        "dropped": sum(step.dropped for step in steps),
        "clipped": sum(step.clipped for step in steps),
        "rows": sum(step.rows for step in steps),
        "losses": sum(step.losses for step in steps),
        "loss_first_tenth": float(np.mean(losses[:few])) if losses else None,
        "loss_last_tenth": float(np.mean(losses[-few:])) if losses else None,
        "spread_first": kept[0].spread if kept else None,
        "spread_last": kept[-1].spread if kept else None,
        "lr": [min(s.lr for s in kept), max(s.lr for s in kept)] if kept else None,
        "zero_coefficients": int((coefficients == 0).sum()),
        "adapters": len(header["sites"]),
        "parameters": len(header["params"]),
        "privacy": _privacy(header, len(steps)),
        "run_seed": header["run_seed"],
        "distribution": header["distribution"],
        "initial": header["initial"],
        "config": header["config"],
        "config_sha256": json_sha256(header["config"]),
        "base_sha256": header["base_sha256"],
        "software": header["software"],
    }


def _privacy(header: dict, steps: int) -> str | None:
    """Return what the journal of a private run has spent, None of another."""
    settings = header["config"].get("privacy")
    if not settings:
        return None
    try:
        privacy = Privacy(**settings)
    except (TypeError, ValueError) as error:
        raise JournalError(
            f"the journal's privacy cannot be {settings!r:.60}: {error}", key="config.privacy"
        ) from error
    return f"epsilon {privacy.epsilon(steps):.4g} at delta {privacy.delta:g}, noise {privacy.noise_multiplier:g} x clip"


def describe(found: dict[str, Any]) -> str:
    """Return :func:`statistics` as lines of text."""

    def number(value) -> str:
        return "none" if value is None else f"{value:.4g}"

    lines = [
        ("journal", found["journal"]),
        ("size", f"{found['bytes']:,} bytes" + (f", {found['torn_bytes']} torn" if found["torn_bytes"] else "")),
        ("steps", f"{found['steps']:,}, {found['steps_in_effect']:,} in effect, {found['rollbacks']} rollbacks"),
        ("queries", f"{found['queries']:,}, {found['dropped']:,} dropped, {found['clipped']:,} clipped"),
        ("cost", f"{found['rows']:,} forward rows, {found['losses']:,} losses"),
        (
            "loss",
            f"{number(found['loss_first_tenth'])} in the first tenth, {number(found['loss_last_tenth'])} in the last",
        ),
        ("spread", f"{number(found['spread_first'])} at first, {number(found['spread_last'])} at last"),
        ("learning rate", "none" if found["lr"] is None else f"{number(found['lr'][0])} to {number(found['lr'][1])}"),
        *([("privacy", found["privacy"])] if found["privacy"] else []),
        ("trained", f"{found['adapters']} adapters, {found['parameters']} further parameters"),
        ("directions", f"{found['distribution']}, run seed {found['run_seed']}"),
        ("initial values", "from their seed" if found["initial"] == "seed" else "in the file beside the journal"),
        ("base weights", f"SHA-256 {found['base_sha256'][:16]}..."),
        ("settings", ", ".join(f"{key} {value}" for key, value in sorted(found["config"].items()))),
        ("made by", ", ".join(f"{key} {value}" for key, value in sorted(found["software"].items()))),
    ]
    return facts(lines)


def compare(first: str, second: str) -> tuple[list[str], bool]:
    """Say where two journals part: entries of the header, and the first step with other numbers.

    Returns:
        Lines to print, and whether both make the same numbers in the same way (versions and notes may differ).
    """
    a, b = read(journal_path(first), repair=True), read(journal_path(second), repair=True)
    lines = []
    for key in sorted(a.header.keys() | b.header.keys()):
        ours, theirs = a.header.get(key), b.header.get(key)
        if ours == theirs:
            continue
        if isinstance(ours, dict) and isinstance(theirs, dict):
            for inner in sorted(ours.keys() | theirs.keys()):
                if ours.get(inner) != theirs.get(inner):
                    lines.append(f"{key}.{inner}: {_short(ours.get(inner))} | {_short(theirs.get(inner))}")
        else:
            lines.append(f"{key}: {_short(ours)} | {_short(theirs)}")
    same = all(line.partition(":")[0].partition(".")[0] in ("software", "about") for line in lines)
    for left, right in zip(a.steps, b.steps):
        names = [name for name in _COMPARED if _bits(getattr(left, name)) != _bits(getattr(right, name))]
        if names:
            lines.append(f"step {left.index}: {_step(left, names)} | {_step(right, names)}")
            return [*lines, f"the first {left.index:,} steps are equal"], False
    common = min(len(a.steps), len(b.steps))
    if len(a.steps) != len(b.steps):
        return [*lines, f"{len(a.steps):,} steps | {len(b.steps):,} steps; the first {common:,} are equal"], False
    return [*lines, f"all {common:,} steps are equal"], same


_COMPARED = ("lr", "momentum", "weight_decay", "coefficients", "back_to", "loss", "digest")


def _bits(value) -> bytes:
    return b"none" if value is None else np.asarray(value, np.float64).tobytes()


def _step(step, names: list[str]) -> str:
    return ", ".join(f"{name} {_short(getattr(step, name))}" for name in names)


def _short(value) -> str:
    if isinstance(value, np.ndarray):
        value = [float(number) for number in value[:3]]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
