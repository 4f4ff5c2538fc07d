"""What a run begins with: its settings, as model, data and machine allow them, and a model with a fresh adapter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from adazeta.base_models import architecture, has_own_head, load_base, model_folder
from adazeta.errors import UserError
from adazeta.examples import Example, fields_of
from adazeta.options import note_unread, section
from adazeta.presets import PRESETS
from adazeta.runs import Classifier, card_of
from adazeta.tasks import ChoiceTask, HeadTask, LabelWordTask, Task, choose

FROZEN = ("dtype", "gemm")  # settings of the frozen layers
TRIED = (*FROZEN, "depth", "eps", "lr")  # settings that may be `auto`: what a trial on this machine finds
_ANY = ("0", "1")  # labels of a head before those of the data are known


def settle(settings: Mapping[str, Any], say=lambda line: None, given: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings with ``task`` and ``positions`` as the base model allows.

    Of settings that were ``given``, by a flag or in a file, those that the task does not read are told.

    Raises:
        UserError: no such model, no such device, or details of a private run that is none.
    """
    if not is_private(settings) and (details := [key for key in ("dp_clip", "dp_delta") if key in given]):
        flag = f"--{details[0].replace('_', '-')}"
        raise UserError(f"{flag} alone makes no private training: add --dp-epsilon or --dp-noise, or leave {flag} out")
    if settings["device"] not in ("auto", "cpu"):  # which are there; any other takes torch to tell
        from adazeta.devices import chosen_device

        chosen_device(settings["device"])
    folder = model_folder(settings["model"], say)
    kind = architecture(folder)
    settings = _with_pooling(settings, kind, folder, say)
    task = choose({**settings, "labels": settings["labels"] or _ANY}, kind)
    settings["task"] = task.kind
    note_unread(given, task.kind, say)
    if settings["positions"] == "last" and (settings["task"], kind) != (LabelWordTask.kind, "causal"):
        say(f"adapters act on all positions: task {settings['task']} on the {kind} model does not score the last alone")
        settings["positions"] = "all"
    return settings


def _with_pooling(settings: Mapping[str, Any], kind: str, folder: Path, say) -> dict[str, Any]:
    """Return the settings with a ``pooling``, and the ``depth`` beside it, that begin well on the model in ``folder``.

    What ``transformers`` puts on an encoder without a head reads what pretraining made of one token, and begins far
    behind a mean of all of them (docs/tasks.md). For some models it has no head at all.
    """
    settings = dict(settings)
    if settings["pooling"] is not None:
        return settings
    headed = kind == "encoder" or settings["task"] == HeadTask.kind and kind != "seq2seq"
    has_own = not headed or has_own_head(folder)  # loads part of transformers
    if (has_own and kind != "encoder") or settings["head"] == "tt":  # which adapts the layers of the model's own head
        return {**settings, "pooling": "own"}
    settings["pooling"] = "mean" if is_private(settings) else "attention"
    if settings["depth"] is None and settings["layers"] in (None, "middle") and not is_private(settings):
        settings["depth"] = "auto"
    depth = "" if settings["depth"] is None else f" --depth {settings['depth']}"
    own = "; --pooling own is that of transformers" if has_own else ", for transformers has none for it"
    say(f"the model has no head: it gets --pooling {settings['pooling']}{depth}{own}")
    return settings


def load_data(settings: Mapping[str, Any], say=lambda line: None) -> tuple[dict[str, list[Example]], dict[str, Any]]:
    """Return the splits of settled settings, and the settings with what a task takes from its data.

    Raises:
        UserError: data that cannot be read, or one class only.
    """
    from adazeta.data import load_splits

    settings = dict(settings)
    head = settings["task"] == HeadTask.kind
    if head and settings["labels"] is None:
        settings["labels"] = settings["label_names"]
    task = task_of({**settings, "labels": settings["labels"] or _ANY}, say)
    learned = head and settings["labels"] is None
    splits = load_splits(
        settings["data"],
        fields_of(settings, task),
        labels=None if learned else task.labels,
        same_classes=learned,
        split=settings["split"],
        dev_source=settings["dev_data"],
        dev_split=settings["dev_split"],
        shots=settings["shots"],
        shots_seed=settings["shots_seed"],
        say=say,
    )
    if task.kind == ChoiceTask.kind:
        settings["candidates"] = max(len(e.choices) for split in splits.values() for e in split)
    if task.labels is None:
        return splits, settings
    counts = Counter(example.label for example in splits["train"])
    if len(counts) < 2:
        raise UserError(
            f"a classifier needs examples of two labels or more, {settings['data']} has only {list(counts)} to train on"
        )
    if learned:
        settings["labels"] = sorted({example.label for split in splits.values() for example in split})
        counts.update(example.label for example in splits["dev"])
    labels = settings["labels"] if head else task.labels
    if missing := [label for label in labels if not counts[label]]:
        say(f"note: no example of {', '.join(map(repr, missing))}")
    if rare := [label for label in labels if counts[label] == 1 and settings["shots"] != 1]:
        say(f"note: one example only of {', '.join(map(repr, rare))}: is that a class?")
    return splits, settings


def task_of(settings: Mapping[str, Any], say=lambda line: None) -> Task:
    """Return the task that settled settings describe."""
    return choose(settings, architecture(model_folder(settings["model"], say)))


def to_measure(settings: Mapping[str, Any]) -> list[str]:
    """Return which settings are ``auto``: ``eps``, ``lr``, both or neither (``adazeta.auto`` measures them)."""
    return [name for name in ("eps", "lr") if settings[name] == "auto"]


def check_measurable(settings: Mapping[str, Any]) -> None:
    """Raise UserError where what is measured is not what a run with these settings would do."""
    if (name := settings["objective"]) != "loss":
        raise UserError(f"the task's loss is what is measured, and {name} is another one: eps and lr for it are tried")
    if is_private(settings):
        raise UserError("measuring eps and lr looks at the data without noise: give a private run numbers")


def is_private(settings: Mapping[str, Any]) -> bool:
    """Whether a run of these settings is differentially private."""
    return settings["dp_epsilon"] is not None or settings["dp_noise"] is not None


def starts_fitted(settings: Mapping[str, Any]) -> bool:
    """Whether a run of these settings begins with a fitted head: unless they say otherwise, or it is private."""
    if settings["task"] != HeadTask.kind:
        return False
    return (settings["head_start"] or ("random" if is_private(settings) else "fitted")) == "fitted"


def with_fitted_lr(settings: Mapping[str, Any], preset: str, given: Collection[str]) -> dict[str, Any]:
    """Return settled settings of a new run with the learning rate for a fitted head in the place of the preset's."""
    rates = PRESETS[preset]
    asked = "lr" in given or settings["lr"] != rates.train["learning_rate"]
    if asked or rates.fitted_lr is None or not starts_fitted(settings):
        return dict(settings)
    return {**settings, "lr": rates.fitted_lr}


def as_before(settings: Mapping[str, Any], stored: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings of a resumed run: what trials found when it began stays."""
    if not stored:
        return dict(settings)
    found = {name: stored[name] for name in TRIED if settings[name] == "auto" and name in stored}
    return {**settings, **found}


def with_numbers(settings: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """Return the settings with the preset's numbers for those that have yet to be measured."""
    numbers = {"eps": PRESETS[preset].zo["eps"], "lr": PRESETS[preset].train["learning_rate"]}
    return {**settings, **{name: numbers[name] for name in to_measure(settings)}}


def settle_machine(settings: Mapping[str, Any], preset: str, say=lambda line: None) -> dict[str, Any]:
    """Set threads and determinism of this process; return the settings with the number format for its processor."""
    import torch

    from adazeta.frozen import choose_dtype

    settings = make_deterministic(settings) if settings["deterministic"] else dict(settings)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    if settings["dtype"] == "auto":
        settings["dtype"] = choose_dtype(zo_config(with_numbers(settings, preset), preset).eps)
        say(
            f"base model in {settings['dtype']}{' (linear layers in bfloat16)' if settings['dtype'] == 'mixed' else ''}"
        )
    return settings


def make_deterministic(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Let nothing depend on the clock or on the order of threads; return the settings with what that decides.

    Raises:
        UserError: a limit in minutes.
    """
    import os

    import torch

    if settings["max_minutes"] is not None:
        raise UserError("--deterministic: where --max-minutes ends a run depends on the clock; use --rows or --steps")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may sum in any order
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # `auto` times formats and products, and the sums of a product depend on the number of threads.
    chosen = {"dtype": "float32", "gemm": "plain"}
    chosen = {name: value if settings[name] == "auto" else settings[name] for name, value in chosen.items()}
    return {**settings, **chosen, "threads": settings["threads"] or 1}


def new_classifier(settings: Mapping[str, Any], preset: str, say) -> Classifier:
    """Load the base model and give it a fresh adapter.

    Raises:
        UserError: the model cannot be loaded, or the adapter's settings do not fit it.
    """
    import peft

    from adazeta import TTConfig
    from adazeta.heads import head_modules
    from adazeta.tuner.places import tt_head

    task = task_of(settings, say)
    stored = {name: settings[name] for name in ("dtype", "quantize", "device")}
    base, tokenizer = load_base(settings["model"], task=task, **stored, say=say)
    keywords = section("tt", settings, preset)
    if settings["init_seed"] is None:
        keywords["init_seed"] = settings["seed"]
    try:
        if task.kind == HeadTask.kind:
            keywords["modules_to_save"] = head_modules(base)
            if settings["head"] == "tt":
                found = tt_head(base, keywords["sites"], keywords["modules_to_save"])
                keywords |= found
                if not found:
                    say("--head tt: the head is one linear layer, which trains in full")
        elif base.can_generate():
            keywords["task_type"] = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
        model = peft.get_peft_model(base, TTConfig(**keywords))
    except (ValueError, TypeError) as error:
        raise UserError(f"adapter: {error}") from error
    settings = {**settings, "gemm": _pack(model, settings["gemm"], say)}
    classifier = Classifier(model, tokenizer, task, card_of(settings, task, preset))
    loss = classifier.loss()  # checks that the task fits the model
    if keywords.get("positions") == "last" and loss.rows_per_example > 1:
        raise UserError(
            f"the label words {list(task.words)} have several tokens, and adapters on the last token score one: "
            "choose other --label-words, or add --positions all"
        )
    return classifier


def _pack(model, gemm: str, say) -> str:
    """Pack the frozen linear layers where asked for or found faster; return what was done: a resumed run repeats it."""
    from adazeta import frozen
    from adazeta.planner import tokens_per_forward

    tokens = tokens_per_forward(model)
    if gemm == "auto":
        return frozen.pack_where_faster(model, tokens, say)
    if gemm == "packed" and not frozen.pack(model, tokens):
        say("frozen linear layers plain: none of them can be packed here")
        return "plain"
    return gemm


def zo_config(settings: Mapping[str, Any], preset: str, examples: int | None = None):
    """Return the ``ZOConfig`` of the settings; with the number of training ``examples`` also what makes it private."""
    from adazeta import ZOConfig

    keywords = {**section("zo", settings, preset), "run_seed": settings["seed"]}
    if examples is not None and settings["dp_noise"] is not None:
        from adazeta.privacy import Privacy

        sizes = {"batch_size": settings["batch_size"], "examples": examples, "delta": settings["dp_delta"]}
        keywords["privacy"] = Privacy(settings["dp_clip"], settings["dp_noise"], **sizes)
    return ZOConfig(**keywords)


def steps_per_epoch(settings: Mapping[str, Any], examples: int) -> int:
    """Return the steps of an epoch, which ends with the examples that are left over, as the Trainer's does."""
    return max(1, math.ceil(examples / (settings["batch_size"] * settings["accumulate"])))


def steps_of(settings: Mapping[str, Any], preset: str, examples: int) -> int:
    """Return the steps of a run on so many training examples, as the Trainer counts them."""
    keywords = section("train", settings, preset)
    if (steps := keywords.get("max_steps", -1)) > 0:
        return steps
    return math.ceil(keywords.get("num_train_epochs", 3) * steps_per_epoch(settings, examples))


def training_arguments(
    settings: Mapping[str, Any], preset: str, folder: Path, *, examples: int, dev: bool, resume: Path | None
):
    """Return the ``transformers.TrainingArguments`` of the settings."""
    import torch
    from transformers import TrainingArguments

    keywords = section("train", settings, preset)
    steps = steps_of(settings, preset, examples)
    tenth = max(1, steps // 10)
    keywords["train_sampling_strategy"] = "group_by_length" if settings["group_by_length"] else "random"
    keywords.update(
        output_dir=str(folder),
        use_cpu=settings["device"] == "cpu",
        seed=settings["seed"] % 2**32,  # what numpy takes; the directions use all 64 bits
        per_device_eval_batch_size=settings["eval_batch_size"],
        eval_strategy="steps" if dev else "no",
        eval_steps=settings["eval_every"] or max(1, steps // 4),
        eval_on_start=dev and resume is None,
        save_strategy="steps",
        save_steps=settings["save_every"] or tenth,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=settings["report_to"] or [],
        run_name=folder.name.removesuffix(".partial"),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
    )
    try:
        return TrainingArguments(**keywords)
    except (ValueError, TypeError) as error:
        raise UserError(f"settings: {' '.join(str(error).split())}") from error


def settle_privacy(
    settings: Mapping[str, Any], preset: str, examples: int, say, processes: int = 1, *, resume: bool = False
) -> dict[str, Any]:
    """Return the settings with the noise that ``dp_epsilon`` asks for.

    A resumed run finds both there: it keeps its noise, and what it was asked to keep within.

    Raises:
        UserError: settings out of their range, both for a new run, more steps than epsilon allows, more than one
            process, or no accountant library.
    """
    if not is_private(settings):
        return dict(settings)
    if not resume and settings["dp_epsilon"] is not None and settings["dp_noise"] is not None:
        raise UserError("private training: --dp-epsilon asks for a noise, and --dp-noise gives it: give one of them")
    if processes > 1:
        raise UserError(
            f"private training: examples are drawn in one process, got {processes}; examples/federated.py is for many"
        )
    if settings["head_start"] == "fitted":
        raise UserError("private training: --head-start fitted looks at the data without noise; use random")
    from adazeta.privacy import Privacy

    steps = steps_of(settings, preset, examples)
    try:
        if settings["dp_noise"] is None:
            sizes = {"batch_size": settings["batch_size"], "examples": examples, "delta": settings["dp_delta"]}
            privacy = Privacy.for_epsilon(settings["dp_epsilon"], steps=steps, clip=settings["dp_clip"], **sizes)
            settings = {**settings, "dp_noise": privacy.noise_multiplier}
        privacy = zo_config(settings, preset, examples).privacy
    except ValueError as error:
        raise UserError(f"private training: {error}") from error
    epsilon, asked = privacy.epsilon(steps), settings["dp_epsilon"]
    if asked is not None and not epsilon <= asked:
        raise UserError(
            f"private training: {steps:,} steps with this run's noise, {privacy.noise_multiplier:g}, spend epsilon "
            f"{epsilon:.5g}, expected {asked:g} at most (--dp-epsilon): take fewer --steps"
        )
    spent = f"epsilon {epsilon:.3g} at delta {privacy.delta:g} after {steps:,} steps"
    say(f"private: noise {privacy.noise_multiplier:g} x clip {privacy.clip:g}, so {spent}")
    return dict(settings)
