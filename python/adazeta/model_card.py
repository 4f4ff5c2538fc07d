"""Model cards: the README.md of an adapter: what it learned from, how well, at what cost, and how it is used.

No path of the machine that trained gets into a card: base models and data are named as the hub or a file's name has it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from . import __version__, assets
from .hub_models import is_hub_name
from .report import facts, machine
from .rows import HUB
from .runs import ADAPTER, CARD, CURVES, METRICS, SUMMARY, read_card, read_json, write_json

NAME = "README.md"
TAGS = ["adazeta", "peft", "zeroth-order"]
#: What a PEFT method is called, where its own name says little.
METHODS = {"TT": "tensor-train"}
HUB_NAMES = {assets.MODEL_NAME: "HuggingFaceTB/SmolLM2-135M-Instruct"}
DATA_NAMES = {"movies": "Movie review sentences (Hutto and Gilbert 2014)"}
PIPELINES = {"completion": "text-generation"}
#: What a card says of its journal, where there is one.
REPLAY = "`adazeta replay` rebuilds the adapter from `journal.azj`, bit for bit, and compares it."
#: Settings that may be a path, from the folder of the command too, and never name a model.
SOURCES = ("data", "dev_data", "objective")
#: Settings that a card lists; none of them is a path.
SETTINGS = (
    *("rank", "bottleneck", "sites", "layers", "positions", "act", "bias", "adapter_scale"),
    *("eps", "queries", "directions", "difference", "combine", "clip", "momentum", "distribution"),
    *("lr", "lr_schedule", "warmup_steps", "weight_decay", "batch_size", "accumulate"),
)


def hub_name(model: str | Path) -> str | None:
    """Return the hub's name of a base model, None where a folder does not tell it."""
    if str(model) in HUB_NAMES:
        return HUB_NAMES[str(model)]
    if is_hub_name(model):
        return str(model).removeprefix(HUB).partition("@")[0]
    folder = Path(model)
    for part in folder.parts:  # the hub's cache
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    if folder.is_dir():
        config = folder / "config.json"
        stored = json.loads(config.read_text(encoding="utf-8")).get("_name_or_path") if config.is_file() else None
        return hub_name(stored) if stored and not Path(stored).is_dir() else None
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) and not folder.is_file()  # a GGUF file is one
    return str(model) if named else None


def describe_run(card: Mapping[str, Any], summary: Mapping[str, Any], name: str, model) -> dict:
    """Return what the model card of a run says, for :func:`model_card`.

    Args:
        card: ``adazeta.json``.
        summary: ``summary.json``.
        name: of the run's folder.
        model: the adapted model.
    """
    settings = card["settings"]
    shown = {"preset": card["preset"], "dtype": card["dtype"], **{k: settings.get(k) for k in SETTINGS}}
    return {
        "name": name,
        "model_class": _class_of(model),
        "base_model": card["base_model"],
        "task": card["task"],
        "data": settings.get("data"),
        "splits": summary["splits"],
        "measured": {split: summary[split] for split in ("test", "dev") if summary.get(split)},
        "training": summary["training"],
        "numbers": summary["adapter"]["numbers"],
        "seed": settings["seed"],
        "settings": {**shown, "objective": summary.get("objective")},  # as typed it may hold a path
        "digests": summary["digests"],
        "machine": summary["machine"],
    }


def describe_trainer(trainer, name: str | None = None) -> dict:
    """Return what the model card of a :class:`adazeta.ZOTrainer` says, for :func:`model_card`."""
    model, args, optimizer = trainer.model, trainer.args, trainer.zeroth_order
    evaluations = [line for line in trainer.state.log_history if "eval_loss" in line]
    own = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
    measured = [
        {key.removeprefix("eval_"): value for key, value in line.items() if key.startswith("eval_") and key not in own}
        for line in evaluations
    ]
    splits = {}
    for split, data in (("train", trainer.train_dataset), ("dev", trainer.eval_dataset)):
        if hasattr(data, "__len__"):
            splits[split] = len(data)
    settings = {"eps": trainer.zo.eps, "queries": trainer.zo.queries, "lr": args.learning_rate}
    settings |= {"batch_size": args.per_device_train_batch_size, "accumulate": args.gradient_accumulation_steps}
    return {
        "name": name or Path(args.output_dir).resolve().name,
        "model_class": _class_of(model),
        "base_model": getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__,
        "method": _method(model),
        "splits": splits,
        "measured": {"dev": {"before": measured[0], "after": measured[-1]}} if measured else {},
        "training": {
            "steps": trainer.state.global_step,
            "rows": optimizer.rows if optimizer is not None else 0,
            "losses": optimizer.evaluations if optimizer is not None else 0,
        },
        "numbers": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seed": args.seed if trainer.zo.run_seed is None else trainer.zo.run_seed,
        "settings": settings,
        "machine": machine(),
    }


def model_card(about: Mapping[str, Any]) -> ModelCard:
    """Return the card, with the hub's metadata.

    Args:
        about: of :func:`describe_run` or :func:`describe_trainer`; of its keys only ``name`` and ``base_model`` are
            needed.
    """
    base, task = hub_name(about["base_model"]), about.get("task") or {}
    pipeline = PIPELINES.get(task.get("kind"), "text-classification") if task else None
    data = _data(about.get("data"))
    measured = about.get("measured") or {}
    results = [
        EvalResult(
            task_type=pipeline or "text-generation",
            dataset_type=data["type"],
            dataset_name=data["name"],
            dataset_split=split,
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for split, values in measured.items()
        for metric, value in values["after"].items()
        if isinstance(value, (int, float))
    ]
    metadata = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag=pipeline,
        datasets=[data["hub"]] if data["hub"] else None,
        tags=[*TAGS, _method_name(about), *([f"base_model:adapter:{base}"] if base else [])],
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=about["name"] if results else None,
        eval_results=results or None,
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{_text(about, base, data)}")


def _data(source: str | None) -> dict[str, str | None]:
    """Return the name of a data source without a path: for people, for the metadata, and at the hub."""
    if source is None:
        return {"name": "own data", "type": "own", "hub": None}
    if str(source).startswith("hub:"):
        hub = str(source).removeprefix("hub:").partition("@")[0].partition(":")[0]
        return {"name": hub, "type": hub, "hub": hub}
    name = Path(source).name
    return {"name": DATA_NAMES.get(source, name), "type": Path(name).stem, "hub": None}


def _text(about: Mapping[str, Any], base: str | None, data: Mapping[str, Any]) -> str:
    shown = f"[{base}](https://huggingface.co/{base})" if base else f"`{Path(about['base_model']).name}`"
    numbers = f"{about['numbers']:,} numbers " if about.get("numbers") else ""
    parts = [
        f"# {about['name']}",
        f"A {_method_name(about)} adapter for {shown}: {numbers}trained by forward passes alone with `adazeta` "
        f"{__version__}, after AdaZeta ([arXiv 2406.18060](https://arxiv.org/abs/2406.18060)). The base model is "
        "unchanged.",
    ]
    for heading, body in (
        ("Use", _use(about, base)),
        ("Results", _results(about.get("measured") or {})),
        ("Data", _rows(about, data)),
        ("Training", _training(about)),
    ):
        if body:
            parts += [f"## {heading}", body]
    return "\n\n".join(parts) + "\n"


def _use(about: Mapping[str, Any], base: str | None) -> str:
    parts, name, task = [], about["name"], about.get("task") or {}
    if model_class := about.get("model_class"):
        classes = f", num_labels={len(task['labels'])}" if task.get("kind") == "head" else ""
        parts.append(
            "```python\nimport adazeta.tuner  # the adapter as a method of PEFT\nfrom peft import PeftModel\n"
            f"from transformers import {model_class}\n\n"
            f'base = {model_class}.from_pretrained("{base or "BASE_MODEL_FOLDER"}"{classes})\n'
            f'model = PeftModel.from_pretrained(base, "{name}")\n```'
        )
    if task:
        parts.append(f'On the command line: `adazeta predict {name} "a text"`.')
    return "\n\n".join(parts)


def _method_name(about: Mapping[str, Any]) -> str:
    method = about.get("method", "TT")
    return METHODS.get(method, method)


def _method(model) -> str:
    """Return the PEFT method of a model's adapter, ``TT`` if it is ours."""
    return next(iter(model.peft_config.values())).peft_type.value


def _class_of(model) -> str | None:
    """Return the name of the base model's class, if it is one of transformers."""
    import transformers

    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    return name if hasattr(transformers, name) else None


def _results(measured: Mapping[str, Any]) -> str:
    lines = ["| split | metric | before | after |", "| --- | --- | --- | --- |"]
    for split, values in measured.items():
        for metric, after in values["after"].items():
            before = values["before"].get(metric)
            if isinstance(after, (int, float)):
                lines.append(f"| {split} | {metric} | {'' if before is None else f'{before:.4f}'} | {after:.4f} |")
    return "\n".join(lines) if measured else ""


def _rows(about: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count:,} {split}" for split, count in (about.get("splits") or {}).items() if count)
    lines = [f"{data['name']}: {counts} examples." if counts else f"{data['name']}."]
    task = about.get("task") or {}
    if "template" in task:
        lines.append(f"Task {task.get('kind', 'label-words')}, with the prompt\n\n```\n{task['template']}\n```")
    if "label_words" in task:
        words = ", ".join(f"`{label}` as `{word}`" for label, word in task["label_words"].items())
        lines.append(f"The classes and their words: {words}.")
    elif task.get("labels"):
        lines.append(f"The classes: {', '.join(f'`{label}`' for label in task['labels'])}.")
    return "\n\n".join(lines)


def _training(about: Mapping[str, Any]) -> str:
    training, place = about.get("training") or {}, about.get("machine") or {}
    pairs = [(name, f"{training[name]:,}") for name in ("steps", "rows", "losses") if name in training]
    if "seconds" in training:
        pairs.append(("seconds", f"{training['seconds']:,.0f}, evaluations left out"))
    pairs.append(("seed", str(about.get("seed"))))
    pairs += [(key, str(value)) for key, value in (about.get("settings") or {}).items() if value is not None]
    pairs += [(key, str(place[key])) for key in ("device", "threads", "torch", "transformers", "peft") if key in place]
    pairs += [(key, value) for key, value in (about.get("digests") or {}).items()]
    text = f"```\n{facts(pairs)}\n```"
    if about.get("digests"):
        text += f"\n\n{REPLAY}"
    return text


def push_run(
    folder: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    api=None,
    say: Callable[[str], None] = lambda line: None,
):
    """Upload a run folder to the hub: adapter, model card, metrics and, if it names no path, the journal.

    Paths of this machine are replaced by the names of the files or of the base model at the hub.

    Args:
        folder: the run folder.
        repository: ``owner/name``; made if it is not there.
        private: whether a repository that is made is private; None: as the owner has it set.
        token: of the hub; None: the one that is logged in.
        api: a ``huggingface_hub.HfApi``, else a new one.
        say: told what is left out.

    Returns:
        What ``HfApi.upload_folder`` returns.

    Raises:
        UserError: no run folder, or a damaged one.
    """
    from huggingface_hub import HfApi

    from .journal import NAME as JOURNAL
    from .journal import initial_path, read

    folder, api = Path(folder), api or HfApi(token=token)
    card = read_card(folder)
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary)
        for name in (ADAPTER, NAME, METRICS, CURVES):
            if (folder / name).is_file():
                shutil.copy(folder / name, target / name)
        for name in (CARD, SUMMARY, "adapter_config.json"):
            if (folder / name).is_file():
                write_json(target / name, _without_paths(read_json(folder / name)))
        if (folder / JOURNAL).is_file():
            header = read(folder / JOURNAL, repair=True).header
            if os.path.isabs(str(header["about"].get("base_model", ""))):
                say(f"{JOURNAL} is left out: it names the folder of the base model, and cannot be changed")
                if (target / NAME).is_file():
                    text = (target / NAME).read_text(encoding="utf-8")
                    (target / NAME).write_text(text.replace(f"\n\n{REPLAY}", ""), encoding="utf-8")
            else:
                needed = [initial_path(folder / JOURNAL, header)] if header["initial"] == "file" else []
                for path in (folder / JOURNAL, *needed):
                    shutil.copy(path, target / path.name)
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        message = f"Adapter for {hub_name(card['base_model']) or Path(card['base_model']).name}"
        return api.upload_folder(repo_id=repository, folder_path=str(target), commit_message=message)


def _without_paths(values: Mapping[str, Any]) -> dict:
    """Return JSON values with names in place of paths, in settings and base models."""
    found = {}
    for key, value in values.items():
        if key == "settings" and isinstance(value, Mapping):
            value = _without_paths(value)
        elif key in SOURCES and isinstance(value, str) and not value.startswith(HUB):
            value = Path(value).name
        elif isinstance(value, str) and (os.path.isabs(value) or value.startswith(("~/", "./", "../"))):
            value = hub_name(value) or Path(value).name
        found[key] = value
    return found
