"""``adazeta info``: what a run, a model or a width holds, read from files only."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from adazeta.errors import UserError
from adazeta.gguf_models import gguf_file
from adazeta.report import adapter_size, before_after, facts
from adazeta.runs import ADAPTER, CARD, SUMMARY, is_run, model_folder, read_card, read_json


def describe(name: str, *, rank: int = 5, bottleneck: int = 64, say=lambda line: None) -> str:
    """Return a description of a width (an integer), a run folder or a base model folder.

    Args:
        name: a width such as ``"4096"``, a folder, or ``"smollm2"``.
        rank, bottleneck: the adapter whose shapes are told for a width or a base model.

    Raises:
        UserError: none of these, a damaged run, or a width that has no TT shape.
    """
    if name.isdigit():
        return _layout(int(name), rank, bottleneck)
    folder = Path(name)
    if folder.is_dir() and (is_run(name) or not (folder / "config.json").is_file() and gguf_file(folder) is None):
        return _describe_run(Path(name))
    return _describe_model(name, rank, bottleneck, say)


def _layout(width: int, rank: int, bottleneck: int) -> str:
    from adazeta_kernels import TTAdapterLayout

    try:
        return TTAdapterLayout.auto(width, bottleneck, rank).describe()
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def _describe_model(name: str, rank: int, bottleneck: int, say) -> str:
    folder = model_folder(name, say)
    config = read_json(folder / "config.json")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    lines = [
        ("base model", str(folder)),
        ("architecture", ", ".join(config.get("architectures") or [config.get("model_type", "unknown")])),
        ("blocks", str(config.get("num_hidden_layers", "unknown"))),
        ("width", str(config.get("hidden_size", "unknown"))),
        ("vocabulary", f"{config.get('vocab_size', 0):,}"),
        ("weights", f"{size / 1e6:,.1f} MB"),
    ]
    width = config.get("hidden_size")
    return facts(lines) + (f"\n\n{_layout(width, rank, bottleneck)}" if isinstance(width, int) else "")


def _describe_run(folder: Path) -> str:
    from safetensors import SafetensorError, safe_open

    card = read_card(folder)
    adapter = read_json(folder / "adapter_config.json")
    try:
        size = adapter_size(folder)
        with safe_open(folder / ADAPTER, framework="np") as stored:
            names = list(stored.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{folder / ADAPTER} is damaged or cut off: rebuild it with `adazeta replay {folder} --write`"
        ) from error
    sites = Counter(name.split(".")[-2] for name in names if name.endswith(".tt_theta"))
    task = card["task"]
    lines = [
        ("run", str(folder)),
        ("base model", card["base_model"]),
        ("preset, seed", f"{card.get('preset')}, {card.get('settings', {}).get('seed')}"),
        *_measured(card),
        ("task", task.get("kind", "label-words")),
        ("template", repr(task["template"])),
        *_answers(task),
        ("adapter", f"{size['numbers']:,} numbers in {size['tensors']} tensors, {size['file_bytes']:,} bytes"),
        ("sites", ", ".join(f"{count} x {module}" for module, count in sorted(sites.items()))),
        ("rank, bottleneck", f"{adapter.get('rank')}, {adapter.get('bottleneck')}"),
        ("journal", f"{size['journal_bytes']:,} bytes"),
    ]
    text = facts(lines)
    shapes = _shapes(folder)
    if shapes:
        text += "\n\n" + "\n".join(shapes)
    if (folder / SUMMARY).is_file():
        summary = read_json(folder / SUMMARY)
        measured = [name for name in ("test", "dev") if summary.get(name)]
        rows = [(name, summary[name]["before"], summary[name]["after"]) for name in measured]
        text += "\n\n" + before_after(rows) if rows else ""
    return text


def _measured(card: dict) -> list[tuple[str, str]]:
    """Return eps and lr of a run, and what they come from if they were measured."""
    settings, found = card.get("settings", {}), card.get("calibration")
    lines = [(name, f"{settings[name]:g}") for name in ("eps", "lr") if isinstance(settings.get(name), float)]
    if not isinstance(found, dict):
        return lines
    from adazeta.calibration import Calibration
    from adazeta.calibration_report import measured

    try:
        return lines + measured(Calibration(**found))
    except (TypeError, ValueError) as error:
        raise UserError(f"{CARD} is damaged (calibration: {error}): train again") from error


def _answers(task: dict) -> list[tuple[str, str]]:
    """Return the line that says what a model of this task answers with."""
    if "label_words" in task:
        return [("label words", ", ".join(f"{label} ->{word}" for label, word in task["label_words"].items()))]
    if "labels" not in task:
        return []
    where = f", behind block {task['depth']}" if task.get("depth") else ""
    return [("labels", ", ".join(task["labels"])), ("head", f"{task.get('pooling', 'own')}{where}")]


def _shapes(folder: Path) -> list[str]:
    """Return one description per kind of adapter in the run, from the journal's header."""
    from adazeta.journal import NAME, read
    from adazeta_kernels import TTAdapterLayout

    if not (folder / NAME).is_file():
        return []
    header = read(folder / NAME, repair=True).header
    kinds = Counter(tuple(site["layout"]) for site in header["sites"])
    return [f"{count} x {TTAdapterLayout.decode(list(layout)).describe()}" for layout, count in kinds.items()]
