"""The settings of a run: one table for flags, YAML keys, units, defaults and where each value goes.

A value is taken from the flag, else from the YAML file, else from the dataset template that one of them names, else
from the preset, else from the table.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from adazeta.errors import UserError
from adazeta.hub_models import FORM
from adazeta.kinds import (
    boolean,
    cache_setting,
    directions,
    integer,
    layers,
    minutes,
    names,
    natural,
    number_or_auto,
    positive,
    queries,
    services,
    thread_count,
)
from adazeta.memory import read_size
from adazeta.objective_options import OBJECTIVE
from adazeta.option import Option
from adazeta.options_data import DATA, SPLITTING, TASK
from adazeta.options_private import PRIVATE
from adazeta.presets import PRESETS

DEVICES = ("auto", "cpu", "cuda")
#: Those of transformers that need only their name; ``TrainingArguments(lr_scheduler_kwargs=...)`` is for others.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
)
_DEEPEST = 10  # levels of a settings file


RUN = [
    Option("output", str, "the run folder", "runs/train"),
    Option("preset", str, "named settings: default or paper", "default", choices=tuple(PRESETS)),
    Option("overwrite", boolean, "replace an earlier run, once this one is whole", False),
    Option(
        "test",
        boolean,
        "measure the movies' test split before and after (of a file: adazeta eval)",
        False,
    ),
]
MODEL = [
    Option(
        "model",
        str,
        f"base model: a folder with config.json, a GGUF file, {FORM} of the Hugging Face hub, 'smollm2' or 'minilm'",
        "smollm2",
    ),
    Option(
        "dtype",
        str,
        "number format of the base model; mixed: float32 with bfloat16 linear layers; auto: mixed in training where "
        "the CPU is faster at it and --eps at least 0.03, else float32",
        "auto",
        choices=("auto", "float32", "mixed", "bfloat16", "float16"),
    ),
    Option(
        "gemm",
        str,
        "frozen linear layers in training on a CPU: plain, packed (weights reordered for oneDNN once), or auto: packed "
        "where a quick trial on the model's own layers finds it faster",
        "auto",
        choices=("auto", "plain", "packed"),
    ),
    Option("device", str, "where to compute: cpu, cuda, or auto: a GPU where there is one", "auto", choices=DEVICES),
    Option("threads", thread_count, "CPU threads", shown="all cores"),
    Option(
        "quantize",
        str,
        "hold the base model's linear layers quantised: int8, int4, fp8 (torchao), bnb8 or bnb4 (bitsandbytes)",
        shown="as the folder has them",
        choices=("int8", "int4", "fp8", "bnb8", "bnb4"),
    ),
]
ADAPTER = [
    Option("rank", integer, "TT rank of every bond", goes_to="tt.rank", default=5),
    Option("bottleneck", positive, "width between down and up", goes_to="tt.bottleneck", default=64),
    Option("sites", names, "paper, published, mlp, or module names", goes_to="tt.sites", default="paper"),
    Option("layers", layers, "blocks with adapters: middle, or such as 0-5,29", goes_to="tt.layers_to_transform"),
    Option("positions", str, "tokens that adapters act on: all or last", goes_to="tt.positions", default="all"),
    Option("act", str, "relu, gelu, silu, tanh or identity", goes_to="tt.act", default="relu"),
    Option("bias", boolean, "biases in the adapters", goes_to="tt.bias", default=True),
    Option("adapter-scale", float, "factor on the adapter's branch", goes_to="tt.scale", default=1.0),
    Option("init", str, "identity or paper", goes_to="tt.init", default="identity"),
    Option("init-gain", float, "standard deviation of down's output at the start", goes_to="tt.init_gain", default=1.0),
    Option(
        "init-seed", integer, "64-bit seed of the initial numbers", goes_to="tt.init_seed", shown="the seed of the run"
    ),
]
METHOD = [
    Option(
        "eps",
        number_or_auto,
        "distance of a probe from theta, in units of the parameters; auto: measured (adazeta calibrate)",
        goes_to="zo.eps",
    ),
    Option("queries", queries, "queries a step: a number, or adaptive:alpha,beta,maximum[,step]", goes_to="zo.queries"),
    Option("directions", directions, "who shares a direction: batch, example or N groups", goes_to="zo.directions"),
    Option("difference", str, "central (two probes a query) or forward (one)", goes_to="zo.difference"),
    Option("combine", str, "mean, or spread (divide by the spread of the projected gradients)", goes_to="zo.combine"),
    Option("floor", float, "smallest spread that is divided by, in loss per unit of z", goes_to="zo.floor"),
    Option("clip", float, "bound on a projected gradient, in spreads", goes_to="zo.clip"),
    Option("momentum", float, "factor on the running direction, in [0, 1)", goes_to="zo.momentum", default=0.0),
    Option("distribution", str, "gaussian or rademacher", goes_to="zo.distribution", default="gaussian"),
    Option(
        "on-divergence",
        str,
        "when a step's projected gradients explode: stop, rollback (to the journal's best point, then half the "
        "learning rate) or ignore",
        goes_to="zo.on_divergence",
        default="stop",
        choices=("stop", "rollback", "ignore"),
    ),
    Option(
        "probes-per-forward",
        positive,
        "most probes in one forward",
        goes_to="zo.probes_per_forward",
        shown="chosen from the number of tokens",
    ),
    Option(
        "memory-budget",
        read_size,
        "memory that a forward may take above the weights, such as 500MiB",
        goes_to="zo.memory_budget",
        shown="half of what is free",
    ),
    Option(
        "prefix-cache",
        cache_setting,
        "where outputs of blocks below the first adapter are kept for later epochs: off, memory or disk, with a limit "
        "as in memory:2GiB (else a quarter of what is free); auto: memory in runs of more than one epoch",
        goes_to="zo.prefix_cache",
        default="auto",
    ),
]
TRAINING = [
    Option("seed", integer, "64-bit seed of directions and of the order of the data", 0),
    Option("steps", positive, "steps", goes_to="train.max_steps"),
    Option("rows", positive, "stop after so many forward rows", shown="no limit"),
    Option("max-minutes", minutes, "stop training after so many minutes", shown="no limit"),
    Option("batch-size", positive, "examples per step", goes_to="train.per_device_train_batch_size", default=16),
    Option(
        "data-ranks",
        positive,
        "under torchrun: parts that a batch is cut into; processes that hold the same part share the queries",
        1,
    ),
    Option("accumulate", positive, "batches per step", goes_to="train.gradient_accumulation_steps", default=1),
    Option(
        "lr",
        number_or_auto,
        "learning rate; auto: measured (adazeta calibrate); without either "
        f"{PRESETS['default'].fitted_lr:g} where a head begins fitted",
        goes_to="train.learning_rate",
    ),
    Option(
        "lr-schedule",
        str,
        f"how the learning rate changes: {', '.join(SCHEDULES)}",
        goes_to="train.lr_scheduler_type",
        default="linear",
        choices=SCHEDULES,
    ),
    Option(
        "warmup-steps",
        float,
        "steps of rising learning rate; below 1 a fraction of all steps",
        goes_to="train.warmup_steps",
        default=0,
    ),
    Option(
        "weight-decay", float, "per unit of lr, on everything but biases", goes_to="train.weight_decay", default=0.0
    ),
    Option("group-by-length", boolean, "batches of texts of similar length", True),
    Option("eval-every", positive, "steps between evaluations on dev", shown="a quarter of the steps"),
    Option("eval-limit", positive, "most dev examples evaluated", 250),
    Option("eval-batch-size", positive, "examples per forward of an evaluation", 32),
    Option(
        "keep-best",
        str,
        "end with the adapter of the evaluation that was best by this dev metric: loss, accuracy, ...",
        shown="off: that of the last step; with --early-stopping or a fitted head: loss",
    ),
    Option("early-stopping", positive, "stop after so many evaluations without a better one", shown="off"),
    Option("save-every", positive, "steps between checkpoints", shown="a tenth of the steps"),
    Option(
        "fsync-every",
        natural,
        "steps after which the journal is forced to the disk, where it survives a power failure; 0: at checkpoints",
        0,
    ),
    Option(
        "report-to",
        services,
        "also log to tensorboard (files in the run folder), wandb, or both separated by a comma",
        shown="none",
    ),
    Option("deterministic", boolean, "nothing depends on the clock or on the order of threads", False),
]
EVALUATION = [
    Option("limit", positive, "first N examples of the split", shown="all"),
    Option("batch-size", positive, "examples a forward", 32),
]
PLAN = [
    Option("batch-size", positive, "examples per step", 16),
    Option("tokens", positive, "length of the longest example", 64),
    Option("scored", natural, "tokens of an example scored with the whole vocabulary: the answer's, for completion", 0),
    Option("generated", natural, "tokens of an answer that is generated, for --objective f1 and the like", 0),
    Option("directions", directions, "who shares a direction: batch, example or N groups", "batch"),
    Option("dtype", str, "number format", "float32", choices=("float32", "mixed", "bfloat16", "float16")),
    Option("memory-budget", read_size, "memory of a forward, such as 500MiB", shown="half of what is free"),
]
TRAIN = [*MODEL, *DATA, *SPLITTING, *TASK, *OBJECTIVE, *ADAPTER, *METHOD, *TRAINING, *PRIVATE]
GROUPS = {
    "model": MODEL,
    "data": [*DATA, *SPLITTING],
    "task": TASK,
    "objective": OBJECTIVE,
    "adapter": ADAPTER,
    "zeroth-order method": METHOD,
    "training": TRAINING,
    "private training": PRIVATE,
}


def add_options(parser: argparse.ArgumentParser, groups: Mapping[str, list[Option]]) -> None:
    """Give a parser the flags of some groups; flags that are not used leave no attribute."""
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for option in options:
            extra = (
                {"action": argparse.BooleanOptionalAction} if option.kind is boolean else {"metavar": _metavar(option)}
            )
            text = option.describe().replace("%", "%%")
            group.add_argument(f"--{option.name}", dest=option.key, default=argparse.SUPPRESS, help=text, **extra)


def _metavar(option: Option) -> str:
    return {
        integer: "N",
        positive: "N",
        natural: "N",
        thread_count: "N",
        float: "X",
        minutes: "X",
        number_or_auto: "X",
    }.get(option.kind, "TEXT")


def read_yaml(path: str, options: list[Option]) -> dict[str, Any]:
    """Read a YAML file of settings; its keys are those of ``options``.

    Raises:
        UserError: no such file, not YAML, an unknown key (near matches are named), or a value of the wrong kind.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        _check_yaml(text, path)
        content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read the settings file {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or no such date or number
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'key: value' lines, got {type(content).__name__}")
    known = {option.key: option for option in options}
    values = {}
    for name, value in content.items():
        key = str(name).replace("-", "_")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            advice = f"did you mean {' or '.join(known[n].name for n in near)}?" if near else "see adazeta train --help"
            raise UserError(f"{path}: unknown key {name!r}: {advice}")
        values[key] = known[key].read(value, f"{path}, key {name}")
    return values


def _check_yaml(text: str, path: str) -> None:
    """Refuse what settings never need and what can take any memory and time: deep nesting, and aliases of parts."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise UserError(f"{path}: more than {_DEEPEST} levels at byte {event.start_mark.index}")
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{path}: aliases such as *{event.anchor} are not read; write the value out")


def resolve(
    flags: Mapping[str, Any],
    options: list[Option],
    *,
    preset: str = "default",
    from_file: Mapping[str, Any] | None = None,
    stored: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the value of every option: flag, file, ``stored`` (a run that is resumed), dataset template, or preset."""
    template = template_settings(flags, from_file)
    values = {}
    for option in options:
        if option.key in flags:
            values[option.key] = option.read(flags[option.key], f"--{option.name}")
        elif from_file and from_file.get(option.key) is not None:  # `key:` alone gives nothing
            values[option.key] = from_file[option.key]
        elif template and option.name in template:
            values[option.key] = option.read(template[option.name], f"dataset template, {option.name}")
        elif stored and option.key in stored:
            values[option.key] = option.read(stored[option.key], f"stored setting {option.name}")
        else:
            values[option.key] = option.preset_value(preset)
    return values


def template_settings(*sources: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings of the dataset template that the first of the sources to name one names."""
    name = next((source["dataset_template"] for source in sources if source and source.get("dataset_template")), None)
    if name is None:
        return {}
    from adazeta.tasks.templates import entry

    return entry(name)


def given_in(*sources: Mapping[str, Any] | None) -> set[str]:
    """Return the keys that flags and files give a value."""
    return {key for source in sources for key, value in (source or {}).items() if value is not None}


def note_unread(given: Collection[str], task: str, say) -> None:
    """Tell which of the settings that were given a kind of task does not read."""
    for option in TRAIN:
        if option.key in given and option.tasks and task not in option.tasks:
            say(f"--{option.name} has no effect on task {task}")


def section(name: str, values: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """Return the keywords for one of ``tt``, ``zo``, ``train``: the preset's, overridden by ``values``."""
    keywords = dict(getattr(PRESETS[preset], name))
    for option in TRAIN:
        target, _, field = option.goes_to.partition(".")
        if target == name and values.get(option.key) is not None:
            keywords[field] = values[option.key]
    return keywords
