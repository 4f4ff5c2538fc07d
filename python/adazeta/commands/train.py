"""Train an adapter: ``adazeta train``, and ``adazeta demo`` with the demo's model and data."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from ..options import ADAPTER, GROUPS, METHOD, MODEL, RUN, TRAIN, TRAINING, add_options, given_in, read_yaml, resolve
from . import INTERRUPTED, check_data, command, quiet, say, stay_offline

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
    from ..run_folders import check_resumable, partial_of, resumable
    from ..runs import CARD, is_run, read_json

    ranks = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from ..distributed import join

        ranks = join()
    first = ranks is None or ranks.rank == 0

    def on_all(work):
        return work() if ranks is None else ranks.together(work, "settings")

    def on_first(work):
        found = on_all(lambda: work() if first else None)
        return found if ranks is None else ranks.share(found, "settings")

    flags = vars(arguments)
    from_file = on_all(lambda: {**defaults, **(read_yaml(config, [*RUN, *TRAIN]) if config else {})})
    run = on_all(lambda: resolve(flags, RUN, from_file=from_file))
    output = Path(run["output"])
    partial = on_all(lambda: partial_of(output))

    def what_is_there():
        """Return whether to resume, the settings and the preset of what is resumed, and whether all is done."""
        resume, done = arguments.resume, False
        if "TORCHELASTIC_RUN_ID" in os.environ and (resume or int(os.environ["TORCHELASTIC_RESTART_COUNT"])):
            # The same command is started again and again: there may be nothing yet, something, or the whole run.
            again, resume = resume, resumable(partial)
            done = again and not resume and is_run(output) and not run["overwrite"]
        if resume and not done:
            check_resumable(output)  # before the model and the data of no run's settings are fetched
        card = read_json(partial / CARD) if resume and (partial / CARD).is_file() else {}
        return resume, card.get("settings"), card.get("preset", run["preset"]), done

    resume, stored, preset, done = on_first(what_is_there)
    if done:
        if first:
            say(f"{output} is complete")
        return 0
    on_all(lambda: check_named(stored, flags, from_file))
    settings = on_all(lambda: resolve(flags, TRAIN, preset=preset, from_file=from_file, stored=stored))
    if ranks is not None:
        ranks = on_all(lambda: _grid(settings["data_ranks"]))
        ranks.alike({f"--{name}": settings[name.replace("-", "_")] for name in ("rows", "max-minutes")}, "settings")
    on_all(lambda: check_data(settings["data"], settings["dev_data"]))
    stay_offline(settings["data"], settings["dev_data"])

    from ..prepare import as_before
    from ..training import Interrupted, train

    quiet()
    try:
        summary = train(
            as_before(settings, stored),
            preset,
            output,
            resume=resume,
            overwrite=run["overwrite"],
            test=run["test"],
            given=given_in(flags, from_file),
            say=say if first else lambda line: None,
            ranks=ranks,
        )
    except Interrupted:
        if first:
            say(f"stopped; the same command with --output {output} --resume goes on from here")
        return INTERRUPTED
    if first:
        from ..demo import closing_table

        print(closing_table(summary))
        asked = '"a warm, funny, engaging film"' if settings["data"] == "movies" else "--data FILE"
        print(f"\nwritten to {output}; ask it: adazeta predict {output} {asked}")
    return 0


def _grid(data: int):
    from ..distributed import Ranks

    try:
        return Ranks(data)
    except ValueError as error:
        raise UserError(f"--data-ranks: {error}") from error
