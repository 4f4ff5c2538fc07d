"""Train an adapter into a run folder: the part of ``adazeta train`` and ``adazeta demo`` that they share."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adazeta.data import Example
from adazeta.errors import UserError, together
from adazeta.files import disk_errors
from adazeta.measures import Aim, Measures, aim_of, measures_of
from adazeta.memory import Peak, freed_memory_kept, resident_bytes
from adazeta.prepare import (
    FROZEN,
    TRIED,
    load_data,
    new_classifier,
    settle,
    settle_machine,
    settle_privacy,
    training_arguments,
    with_fitted_lr,
    zo_config,
)
from adazeta.report import adapter_size, digests, machine
from adazeta.run_folders import close_partial, open_partial, partial_of, resume_from
from adazeta.runs import CARD, CURVES, METRICS, SUMMARY, Classifier, read_json, read_metrics, write_json
from adazeta.tasks import to_dict


class Interrupted(Exception):
    """Ctrl-C during training; a checkpoint was saved."""


@dataclass
class Outcome:
    """What training reports: steps, forward rows, losses, seconds and the peak resident memory meanwhile.

    ``tokens`` hold padding, ``real_tokens`` do not; ``prefix`` says what the blocks below the first adapter cost;
    ``best_step`` is the one whose adapter was kept, None for the last.
    """

    steps: int
    rows: int
    losses: int
    tokens: int
    real_tokens: int
    prefix: dict[str, int]
    seconds: float
    dropped: int
    privacy: dict[str, Any]
    peak_bytes: int
    best_step: int | None


def fit(
    classifier: Classifier,
    splits: Mapping[str, Sequence[Example]],
    settings: Mapping[str, Any],
    preset: str,
    folder: Path,
    *,
    aim: Aim,
    measures: Measures,
    resume: bool = False,
    say=lambda line: None,
    ranks=None,
) -> Outcome:
    """Train the adapter towards ``aim`` and write adapter, card, journal and metrics to ``folder``.

    Of many ``ranks`` the first writes and evaluates; the others know of the folder what it tells them.

    Raises:
        UserError: wrong settings, a full disk, or losses that are never finite.
        Interrupted: Ctrl-C; ``folder`` holds a checkpoint.
    """
    from transformers import PrinterCallback, TrainerCallback
    from transformers.integrations import WandbCallback

    from adazeta import ZOTrainer
    from adazeta.best import Best
    from adazeta.digests import json_sha256
    from adazeta.journal import NAME as JOURNAL
    from adazeta.progress import Bar, Limits, MetricsFile, Wandb
    from adazeta.recording import check_resumed

    class Card(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):  # not before the journal was found to fit these settings
            write_json(folder / CARD, classifier.card)

    first = ranks is None or ranks.rank == 0
    limits = Limits(settings["rows"], settings["max_minutes"], evaluate=bool(splits["dev"]) and first, ranks=ranks)
    metrics, best = MetricsFile(folder / METRICS), None
    callbacks: list = [Card(), metrics, Bar(), limits] if first else [limits]
    if settings["keep_best"]:
        best = Best(settings["keep_best"], settings["early_stopping"], waits=lambda: limits.interrupted)
        callbacks.append(best)

    def prepare() -> tuple[ZOTrainer, Path | None]:
        prompts = classifier.encode(splits["train"], say)
        dev = classifier.encode(splits["dev"]).by_length() if splits["dev"] and first else []
        zo = zo_config(settings, preset, len(prompts))

        def metrics_of_dev(prediction) -> dict[str, float]:
            predictions = prediction.predictions.argmax(-1)
            further = measures(
                classifier.model, dev, predictions.tolist(), classifier.collator(), settings["eval_batch_size"]
            )
            return {"accuracy": float((predictions == prediction.label_ids).mean()), **further}

        goes_on = resume and first and (folder / JOURNAL).is_file()
        checkpoint = resume_from(folder, say) if goes_on else None
        arguments = training_arguments(
            settings, preset, folder, examples=len(prompts), dev=bool(dev), resume=checkpoint
        )
        try:
            trainer = ZOTrainer(
                model=classifier.model,
                args=arguments,
                zo=zo,
                loss=aim.loss(classifier.task, classifier.loss(), classifier.tokenizer),
                train_dataset=prompts,
                eval_dataset=dev or None,
                data_collator=classifier.collator(),
                compute_metrics=metrics_of_dev,
                callbacks=callbacks,
                journal="resume" if resume else True,
                identity={
                    # Of private data not even a digest goes into a file: it would tell who is among them.
                    "data_sha256": None
                    if zo.privacy
                    else json_sha256([[e.text, e.label, *e.choices] for e in splits["train"]]),
                    # The digest sorts keys, and the order of the classes is part of the task.
                    "task_sha256": json_sha256([to_dict(classifier.task), classifier.task.labels]),
                    **aim.identity(classifier.task),
                    **({} if settings["group_by_length"] else {"order": "random"}),
                },
                about={name: classifier.card[name] for name in ("task", "base_model", "dtype", "quantize", "preset")},
                fsync_every=settings["fsync_every"],
                ranks=ranks,
            )
            trainer.create_optimizer()  # checks the settings of the step
        except (ValueError, TypeError) as error:
            raise UserError(f"settings: {error}") from error
        if goes_on:
            check_resumed(trainer.zeroth_order, folder / JOURNAL, to_dict(classifier.task))
        return trainer, checkpoint

    trainer, checkpoint = together(ranks, prepare, "start")
    zo = trainer.zo
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(WandbCallback):  # what report_to has brought
        trainer.add_callback(Wandb(classifier.card["settings"]))
    prefix, graphs, ends = (getattr(trainer.zeroth_order, name) for name in ("prefix", "graphs", "ends"))
    shared = prefix.describe() if prefix and not getattr(trainer.loss, "generates", False) else ""
    if shared:
        say(shared)
    kind = {"others": bool(trainer.zeroth_order.others), "shared": bool(shared)}
    say(graphs.describe(**kind))
    if graphs.why_not(**kind):
        alike = trainer.zeroth_order._others.behind_adapters(trainer.zeroth_order.model)
        if spared := ends.describe(alike=alike):
            say(spared)
    with disk_errors(folder), freed_memory_kept(), Peak() as peak:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            limits.release()
    if limits.interrupted:
        raise Interrupted
    if best is not None:
        say(f"the adapter is that of step {best.step:,}, where {best.metric} on dev was best")
    if first:
        with disk_errors(folder):
            trainer.save_model(str(folder))
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle of paths
    return Outcome(
        steps=trainer.state.global_step,
        rows=trainer.zeroth_order.rows,
        losses=trainer.zeroth_order.evaluations,
        tokens=trainer.zeroth_order.tokens.processed,
        real_tokens=trainer.zeroth_order.tokens.real,
        prefix=prefix.counts() if prefix and not zo.privacy else {},
        seconds=metrics.seconds,
        dropped=trainer.zeroth_order.dropped,
        privacy={**asdict(zo.privacy), "epsilon": zo.privacy.epsilon(trainer.state.global_step)} if zo.privacy else {},
        peak_bytes=peak.bytes,
        best_step=best.step if best is not None else None,
    )


def train(
    settings: Mapping[str, Any],
    preset: str,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    test: bool = False,
    given: Collection[str] = (),
    say=lambda line: None,
    ranks=None,
) -> dict | None:
    """Train on the splits that ``settings`` name and write the run folder; return the summary.

    Of many ``ranks`` the first opens the folder, writes, evaluates and has a summary to return; the others return None.

    Args:
        settings: values of :data:`adazeta.options.TRAIN`.
        preset: name of the preset they were resolved with.
        output: the run folder.
        resume: go on with an interrupted run.
        overwrite: an earlier run at ``output`` may be replaced, once this one is whole.
        test: evaluate on the test split before and after, and measure peak memory; a file has no such split.
        given: names of the settings that a flag or a file gave; those without effect are told.
        say: told what happens.

    Raises:
        UserError: bad settings or data, a full disk, or losses that are never finite; ``output`` is as it was.
        Interrupted: Ctrl-C; ``<output>.partial`` can be resumed.
    """
    splits, settings = together(ranks, lambda: load_data(settle(settings, say, given), say), "data")
    processes = ranks.size if ranks is not None else 1
    settings = settle_privacy(settings, preset, len(splits["train"]), say, processes, resume=resume)
    settings = settings if resume else with_fitted_lr(settings, preset, given)
    if test and not splits["test"]:
        raise UserError(
            f"--test: {settings['data']} has no test split, only the movie sentences have: keep rows of it in another "
            f"file, and measure them by `adazeta eval {output} --data FILE`"
        )
    if settings["dev_data"] and len(splits["dev"]) > settings["eval_limit"]:
        say(f"{settings['dev_data']}: {settings['eval_limit']} of {len(splits['dev']):,} rows are dev (--eval-limit)")
    splits["dev"] = splits["dev"][: settings["eval_limit"]]
    aim = together(ranks, lambda: aim_of(settings), "objective")
    from adazeta.best import best_metric  # takes transformers, which is loaded when data and settings have been seen

    if aim.is_metric:
        settings = {**settings, "metric": list(dict.fromkeys([*settings["metric"], aim.name]))}
    where = {"dev": bool(splits["dev"]), "processes": processes}
    settings = {**settings, "keep_best": together(ranks, lambda: best_metric(settings, aim, **where), "settings")}
    with ExitStack() as stack:

        def enter():
            if ranks is not None and ranks.rank:
                return partial_of(output)
            return stack.enter_context(open_partial(output, resume=resume, overwrite=overwrite))

        partial = together(ranks, enter, "folder")
        return _train(settings, preset, splits, aim, output, partial, resume=resume, test=test, say=say, ranks=ranks)


def _train(settings, preset, splits, aim: Aim, output: Path, partial: Path, *, resume: bool, test: bool, say, ranks):
    import adazeta.trainer  # noqa: F401  libraries are loaded before memory is measured
    from adazeta.auto import resolve_auto
    from adazeta.demo import measure_memory, shown_sentences
    from adazeta.head_depth import settle_depth
    from adazeta.head_start import start_head
    from adazeta.journal import NAME as JOURNAL
    from adazeta.model_card import NAME as MODEL_CARD
    from adazeta.model_card import describe_run, model_card
    from adazeta.plots import draw_curves

    first = ranks is None or ranks.rank == 0

    def begin(settings) -> tuple[Classifier, dict]:
        """Load the model; return it, and the settings with what trials on this machine found best."""
        settings = settle_depth(settle_machine(settings, preset, say), splits["train"], preset, say)
        classifier = new_classifier(settings, preset, say)
        if not (resume and (partial / JOURNAL).is_file()):  # which has the numbers that the run began with
            start_head(classifier, splits["train"], settings, say)
        if resume and (partial / CARD).is_file() and (measured_then := read_json(partial / CARD).get("calibration")):
            classifier.card["calibration"] = measured_then
        return classifier, resolve_auto(classifier, splits["train"], settings, preset, say)

    begun, tried = None, [key for key in TRIED if settings[key] == "auto"]
    if ranks is not None and tried:  # all do what the first machine finds
        begun = together(ranks, lambda: begin(settings) if first else None, "model")
        found = {**begun[1], **{key: begun[0].card["settings"][key] for key in FROZEN}} if first else {}
        settings = {**settings, **ranks.share({key: found[key] for key in tried if first}, "model")}
    classifier, settings = together(ranks, lambda: begun or begin(settings), "model")
    measures = measures_of(settings, classifier.task, classifier.tokenizer, aim.function)
    model_bytes = resident_bytes() or 0
    held_out = splits["test"] if test and first else []
    measured, memory = {}, {}
    if held_out:
        measured["before"] = _evaluate(classifier, held_out, measures, "test before", settings)
    if held_out:
        memory = measure_memory(classifier, splits["train"], settings, preset, model_bytes)
    told = {"aim": aim, "measures": measures, "resume": resume, "say": say, "ranks": ranks}
    outcome = fit(classifier, splits, settings, preset, partial, **told)
    if not first:
        return None
    if held_out:
        measured["after"] = _evaluate(classifier, held_out, measures, "test after", settings)

    lines = read_metrics(partial / METRICS)
    dev = [line for line in lines if line["kind"] == "dev"]
    last = outcome.steps if outcome.best_step is None else outcome.best_step
    kept = [line for line in dev if line["step"] <= last]
    if memory:
        memory["training_bytes"] = outcome.peak_bytes - model_bytes
    summary = {
        "task": to_dict(classifier.task),
        "base_model": classifier.card["base_model"],
        "preset": preset,
        "objective": aim.name,
        "frozen": {key: classifier.card["settings"][key] for key in FROZEN},
        "seed": settings["seed"],
        "splits": {name: len(examples) for name, examples in splits.items()},
        "test": {when: _numbers(result) for when, result in measured.items()},
        "dev": {"before": _numbers(dev[0]), "after": _numbers(kept[-1])} if dev else {},
        "training": {
            "steps": outcome.steps,
            "best_step": outcome.best_step,
            "rows": outcome.rows,
            "losses": outcome.losses,
            "tokens": outcome.tokens,
            "real_tokens": outcome.real_tokens,
            "tokens_over_real": outcome.tokens / outcome.real_tokens if outcome.real_tokens else 1.0,
            "seconds": round(outcome.seconds, 3),
            "rows_per_s": outcome.rows / outcome.seconds if outcome.seconds else 0.0,
            "dropped": outcome.dropped,
        },
        "privacy": outcome.privacy,
        "memory": memory,
        "prefix": outcome.prefix,
        "adapter": adapter_size(partial),
        "sentences": shown_sentences(classifier, held_out, measured) if held_out else [],
        "machine": machine(),
        "digests": digests(partial, classifier.card),
    }
    with disk_errors(partial):
        draw_curves(
            lines,
            partial / CURVES,
            title=f"{Path(summary['base_model']).name}: {summary['adapter']['numbers']:,} numbers, forward passes only",
            **summary["test"],
        )
        write_json(partial / SUMMARY, summary)
        about = describe_run(classifier.card, summary, output.resolve().name, classifier.model)
        model_card(about).save(partial / MODEL_CARD)
    for path in partial.glob("checkpoint-*"):  # kept until now: the run could have been resumed from them
        shutil.rmtree(path, ignore_errors=True)
    close_partial(partial, output)
    return summary


def _evaluate(classifier: Classifier, examples: Sequence, measures: Measures, label: str, settings: Mapping) -> dict:
    from adazeta.progress import progress_bar

    with progress_bar(len(examples), label, "rows") as bar:
        size = settings["eval_batch_size"]
        result = classifier.evaluate(examples, batch_size=size, progress=bar.update, measures=measures)
        bar.set_postfix_str(f"accuracy {result['accuracy']:.3f}, loss {result['loss']:.3f}")
    return result


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    names = ("accuracy", "loss", "f1", "exact_match", "score")
    return {name: line[name] for name in names if name in line}
