"""The ``adazeta`` command: train, eval, predict, info, replay, journal, demo, fetch.

torch and transformers are imported by the commands, so that help is there at once. What a person can put right is one
line on stderr and exit status 2; results go to stdout, progress and notes to stderr.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from adazeta import __version__
from adazeta.errors import UserError
from adazeta.options import (
    ADAPTER,
    DATA,
    EVALUATION,
    GROUPS,
    METHOD,
    MODEL,
    PLAN,
    RUN,
    TASK,
    TRAIN,
    TRAINING,
    add_options,
    read_yaml,
    resolve,
)

JOURNAL = "adapter from a journal; RUN_OR_MODEL then is the base model, or a run on it (default: none)"
DEMO = {"output": "runs/demo", "preset": "default", "overwrite": True, "test": True}
INTERRUPTED, FAILED, DIFFERENT = 130, 2, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit status: 0, 1 (numbers that differ), 2 (an error), 130 (Ctrl-C)."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        parser.print_help()
        return FAILED
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are folders; nothing is looked up by name
    try:
        return arguments.run(arguments) or 0
    except UserError as error:
        if arguments.debug:
            raise
        close_bars()
        print(f"adazeta: error: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        close_bars()
        print("adazeta: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="adazeta", description="Fine-tune language models by forward passes alone.")
    parser.add_argument("--version", action="version", version=f"adazeta {__version__}")
    parser.set_defaults(run=None, debug=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    train = _command(commands, "train", _train, "train an adapter, by forward passes alone")
    train.add_argument("--resume", action="store_true", help="go on with an interrupted run (default: off)")
    train.add_argument("--config", metavar="FILE", help="YAML file with the same keys as the flags (default: none)")
    add_options(train, {"run": RUN, **GROUPS})

    evaluate = _command(commands, "eval", _eval, "accuracy and loss of a run or of a base model")
    evaluate.add_argument("name", metavar="RUN_OR_MODEL", help="run folder, base model folder, or 'smollm2'")
    evaluate.add_argument("--split", default="test", help="train, dev, test or all; of a file: all (default: test)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object (default: off)")
    evaluate.add_argument("--journal", metavar="FILE", help=JOURNAL)
    add_options(evaluate, {"evaluation": EVALUATION, "model": MODEL[1:], "data": DATA, "task": TASK})

    predict = _command(commands, "predict", _predict, "label and probabilities of texts")
    predict.add_argument("name", metavar="RUN_OR_MODEL", help="run folder, base model folder, or 'smollm2'")
    predict.add_argument("text", nargs="+", help="texts to label; '-' reads one a line from standard input")
    predict.add_argument("--json", action="store_true", help="print one JSON object a line (default: off)")
    predict.add_argument("--journal", metavar="FILE", help=JOURNAL)
    add_options(predict, {"model": MODEL[1:], "task": TASK})

    info = _command(commands, "info", _info, "what a run, a model or a width holds: sizes, shapes, sites")
    info.add_argument("name", metavar="WHAT", help="run folder, base model folder, 'smollm2', or a width such as 4096")
    info.add_argument("--rank", type=int, default=5, metavar="N", help="TT rank, for a width or model (default: 5)")
    info.add_argument(
        "--bottleneck", type=int, default=64, metavar="N", help="adapter bottleneck, for a width or model (default: 64)"
    )

    info.add_argument(
        "--plan", action="store_true", help="for a model: the memory that training will take (default: off)"
    )
    add_options(info, {"with --plan": PLAN})

    replay = _command(commands, "replay", _replay, "rebuild a run's adapter from its journal and compare, bit for bit")
    replay.add_argument("name", metavar="RUN", help="run folder, or a journal")
    replay.add_argument("--at", type=int, metavar="STEP", help="the numbers after so many steps (default: all)")
    replay.add_argument(
        "--verify",
        metavar="FILE",
        help="adapter file, run or checkpoint to compare with, a checkpoint at its own step (default: the saved "
        "adapter, if all steps are done)",
    )
    replay.add_argument("--write", action="store_true", help="write the rebuilt adapter into the run (default: off)")
    replay.add_argument("--backend", metavar="NAME", help="native, triton or reference (default: the fastest)")
    replay.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, ... (default: cpu)")

    journal = _command(commands, "journal", _journal, "look into journals, or compare two")
    actions = journal.add_subparsers(title="actions", metavar="ACTION", help="stats or diff")
    stats = _command(actions, "stats", _journal_stats, "what a journal records: settings, steps, losses, cost")
    stats.add_argument("name", metavar="RUN", help="run folder, or a journal")
    stats.add_argument("--json", action="store_true", help="print one JSON object (default: off)")
    difference = _command(actions, "diff", _journal_diff, "where two runs part: settings, and the first step")
    difference.add_argument("name", metavar="A", help="run folder, or a journal")
    difference.add_argument("other", metavar="B", help="run folder, or a journal")

    demo = _command(commands, "demo", _demo, "fetch model and data, fine-tune, and show what came of it")
    demo.add_argument("--resume", action="store_true", help="go on with an interrupted run (default: off)")
    add_options(demo, {"run": [replace(option, default=DEMO[option.key]) for option in RUN]})
    add_options(demo, {"model": MODEL, "adapter": ADAPTER, "zeroth-order method": METHOD, "training": TRAINING})

    _command(commands, "fetch", _fetch, "fetch and check the demo's model and data")
    return parser


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--debug", action="store_true", help="show where an error came from (default: off)")
    parser.set_defaults(run=run)
    return parser


def say(line: str) -> None:
    """Print a note to stderr, where progress goes."""
    print(line, file=sys.stderr, flush=True)


def close_bars() -> None:
    """Close progress bars that an error left open, so that what follows begins on a line of its own."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", [])):
            bar.close()


def _quiet() -> None:
    """Keep the libraries' own bars and notes off the terminal."""
    import warnings

    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")  # missing keys: told as an error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)


def _train(arguments) -> int:
    return _run_training(arguments, arguments.config, {})


def _demo(arguments) -> int:
    return _run_training(arguments, None, DEMO)


def _run_training(arguments, config: str | None, defaults: dict) -> int:
    from adazeta.runs import CARD, read_json

    flags = vars(arguments)
    from_file = {**defaults, **(read_yaml(config, [*RUN, *TRAIN]) if config else {})}
    run = resolve(flags, RUN, from_file=from_file)
    output, preset, stored = Path(run["output"]), run["preset"], None
    partial = output.with_name(f"{output.name}.partial")
    if arguments.resume and (partial / CARD).is_file():
        card = read_json(partial / CARD)
        stored, preset = card.get("settings"), card.get("preset", preset)
    settings = resolve(flags, TRAIN, preset=preset, from_file=from_file, stored=stored)

    from adazeta.demo import closing_table
    from adazeta.training import Interrupted, train

    _quiet()
    try:
        summary = train(
            settings,
            preset,
            output,
            resume=arguments.resume,
            overwrite=run["overwrite"],
            test=run["test"],
            say=say,
        )
    except Interrupted:
        say(f"stopped; the same command with --output {output} --resume goes on from here")
        return INTERRUPTED
    print(closing_table(summary))
    print(f'\nwritten to {output}; ask it: adazeta predict {output} "a warm, funny, engaging film"')
    return 0


def _open(arguments):
    """Open what an eval or predict command names; task flags override the run's own task."""
    from adazeta.base_models import architecture, model_folder
    from adazeta.runs import Classifier, card_for, own_task
    from adazeta.tasks import choose, to_dict

    _quiet()
    given = {option.key for option in TASK if hasattr(arguments, option.key)}
    values = resolve(vars(arguments), [*MODEL[1:], *TASK])
    task = None
    if given:
        card, own = card_for(arguments.name, arguments.journal), {}
        if stored := own_task(card, arguments.journal or arguments.name):
            own = {"task": stored.kind, **to_dict(stored)}
        merged = {**values, **{key: value for key, value in own.items() if key not in given}}
        task = choose(merged, architecture(model_folder(card["base_model"], say)))
    if values["threads"]:
        import torch

        torch.set_num_threads(values["threads"])
    dtype = None if values["dtype"] == "auto" else values["dtype"]
    return Classifier.open(arguments.name, task=task, dtype=dtype, journal=arguments.journal, say=say)


def _eval(arguments) -> int:
    from adazeta.data import SPLITS, load_splits, read_examples
    from adazeta.progress import progress_bar

    values = resolve(vars(arguments), [*DATA, *EVALUATION])
    if arguments.split not in (*SPLITS, "all"):
        raise UserError(f"--split: expected one of {', '.join(SPLITS)} or all, got {arguments.split!r}")
    classifier = _open(arguments)
    labels = classifier.task.labels
    if values["data"] == "movies":
        splits = load_splits("movies", labels=labels, say=say)
        wanted = SPLITS if arguments.split == "all" else (arguments.split,)
        examples = [example for name in wanted for example in splits[name]]
        what = f"movies, {arguments.split}"
    else:
        columns = {"text_column": values["text_column"], "label_column": values["label_column"]}
        columns["choices_column"] = values["choices_column"] if classifier.task.kind == "choice" else None
        columns["answers"] = classifier.task.kind == "completion"
        examples, what = read_examples(values["data"], labels=labels, **columns), values["data"]
    examples = examples[: values["limit"]]
    with progress_bar(len(examples), "eval", "rows") as bar:
        result = classifier.evaluate(examples, batch_size=values["batch_size"], progress=bar.update)
    if arguments.json:
        numbers = {key: result[key] for key in ("accuracy", "loss")}
        print(json.dumps({"name": arguments.name, "data": what, "examples": len(examples), **numbers}))
    else:
        print(f"accuracy {result['accuracy']:.4f}  loss {result['loss']:.4f}  ({len(examples):,} examples of {what})")
    return 0


def _predict(arguments) -> int:
    texts = []
    for text in arguments.text:
        texts += [line.strip() for line in sys.stdin if line.strip()] if text == "-" else [text.strip()]
    if not texts or not all(texts):
        raise UserError("no text to label: give it in quotation marks, or '-' and one text a line")
    classifier = _open(arguments)
    if classifier.task.kind == "choice":
        raise UserError("a run that chooses between candidates needs them: `adazeta eval` takes a file that has them")
    if classifier.task.kind == "completion":
        for text, answer in zip(texts, classifier.task.generate(classifier.model, classifier.tokenizer, texts)):
            print(json.dumps({"text": text, "answer": answer}, ensure_ascii=False) if arguments.json else answer)
        return 0
    labels = classifier.task.labels
    for text, probabilities in zip(texts, classifier.probabilities(texts)):
        best = max(range(len(labels)), key=probabilities.__getitem__)
        if arguments.json:
            by_label = dict(zip(labels, probabilities))
            print(json.dumps({"text": text, "label": labels[best], "probabilities": by_label}, ensure_ascii=False))
        else:
            others = "  ".join(f"{label} {p:.3f}" for label, p in zip(labels, probabilities))
            print(f"{labels[best]}  ({others})  {text}")
    return 0


def _info(arguments) -> int:
    from adazeta.info import describe
    from adazeta.memory_plan import describe_plan

    sizes = {"rank": arguments.rank, "bottleneck": arguments.bottleneck, "say": say}
    if arguments.plan:
        print(describe_plan(arguments.name, **sizes, **resolve(vars(arguments), PLAN)))
        return 0
    print(describe(arguments.name, **sizes))
    return 0


def _replay(arguments) -> int:
    from adazeta.journal_tools import replay_run

    line, same = replay_run(
        Path(arguments.name),
        arguments.at,
        verify=arguments.verify,
        write=arguments.write,
        device=arguments.device,
        backend=arguments.backend,
    )
    print(line)
    return 0 if same else DIFFERENT


def _journal(arguments) -> int:
    raise UserError("adazeta journal: expected an action, stats or diff; see adazeta journal --help")


def _journal_stats(arguments) -> int:
    from adazeta.journal_tools import describe, statistics

    found = statistics(arguments.name)
    print(json.dumps(found) if arguments.json else describe(found))
    return 0


def _journal_diff(arguments) -> int:
    from adazeta.journal_tools import compare

    lines, same = compare(arguments.name, arguments.other)
    print("\n".join(lines))
    return 0 if same else DIFFERENT


def _fetch(arguments) -> int:
    from adazeta.assets import fetch_all

    for name, path in fetch_all(say).items():
        print(f"{name}: {path}")
    return 0
