"""Train an adapter: ``adazeta train``, and ``adazeta demo`` with the demo's model and data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..options import ADAPTER, GROUPS, METHOD, MODEL, RUN, TRAIN, TRAINING, add_options, read_yaml, resolve
from . import INTERRUPTED, command, quiet, say, stay_offline

DEMO = {"output": "runs/demo", "preset": "default", "overwrite": True, "test": True}


def add(commands) -> None:
    """Add both commands."""
    train = command(commands, "train", _train, "train an adapter, by forward passes alone")
    train.set_defaults(may_go_online=True)
    train.add_argument("--resume", action="store_true", help="go on with an interrupted run (default: off)")
    train.add_argument("--config", metavar="FILE", help="YAML file with the same keys as the flags (default: none)")
    add_options(train, {"run": RUN, **GROUPS})

    demo = command(commands, "demo", _demo, "fetch model and data, fine-tune, and show what came of it")
    demo.add_argument("--resume", action="store_true", help="go on with an interrupted run (default: off)")
    add_options(demo, {"run": [replace(option, default=DEMO[option.key]) for option in RUN]})
    add_options(demo, {"model": MODEL, "adapter": ADAPTER, "zeroth-order method": METHOD, "training": TRAINING})


def _train(arguments) -> int:
    return _run_training(arguments, arguments.config, {})


def _demo(arguments) -> int:
    return _run_training(arguments, None, DEMO)


def _run_training(arguments, config: str | None, defaults: dict) -> int:
    from ..own_function import check_named
    from ..runs import CARD, read_json

    flags = vars(arguments)
    from_file = {**defaults, **(read_yaml(config, [*RUN, *TRAIN]) if config else {})}
    run = resolve(flags, RUN, from_file=from_file)
    output, preset, stored = Path(run["output"]), run["preset"], None
    partial = output.with_name(f"{output.name}.partial")
    if arguments.resume and (partial / CARD).is_file():
        card = read_json(partial / CARD)
        stored, preset = card.get("settings"), card.get("preset", preset)
    check_named(stored, flags, from_file)
    settings = resolve(flags, TRAIN, preset=preset, from_file=from_file, stored=stored)
    stay_offline(settings["data"], settings["dev_data"])

    from ..auto import as_before
    from ..demo import closing_table
    from ..training import Interrupted, train

    quiet()
    try:
        summary = train(
            as_before(settings, stored),
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
    asked = '"a warm, funny, engaging film"' if settings["data"] == "movies" else "--data FILE"
    print(f"\nwritten to {output}; ask it: adazeta predict {output} {asked}")
    return 0
