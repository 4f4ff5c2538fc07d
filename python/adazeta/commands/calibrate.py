"""Measure which eps and lr a run should have: ``adazeta calibrate``."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError
from ..options import GROUPS, RUN, TRAIN, add_options, given_in, read_yaml, resolve
from . import check_data, command, quiet, say, stay_offline

FILE, PLOT = "calibration.json", "calibration.png"
PRESET = [option for option in RUN if option.key == "preset"]


def add(commands) -> None:
    """Add the command."""
    parser = command(commands, "calibrate", _calibrate, "measure noise, curvature and gradient; propose --eps and --lr")
    parser.set_defaults(may_go_online=True)
    parser.add_argument(
        "--output",
        default="runs/calibration",
        metavar="DIR",
        help=f"folder for {FILE} and {PLOT} (default: runs/calibration)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: off)")
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same keys as the flags (default: none)")
    parser.add_argument("--batches", type=int, default=8, metavar="N", help="batches to measure on (default: 8)")
    parser.add_argument("--probed", type=int, default=32, metavar="N", help="directions to look along (default: 32)")
    add_options(parser, {"run": PRESET, **GROUPS})


def _calibrate(arguments) -> int:
    if arguments.batches < 1 or arguments.probed < 8:
        raise UserError(
            f"expected --batches of 1 and --probed of 8 at least, got {arguments.batches}, {arguments.probed}"
        )
    # The file may be that of the run: what it says of the run's folder is of no matter here.
    read = read_yaml(arguments.config, [*RUN, *TRAIN]) if arguments.config else {}
    from_file = {"eps": "auto", "lr": "auto", **read}
    preset = resolve(vars(arguments), PRESET, from_file=read)["preset"]
    settings = resolve(vars(arguments), TRAIN, preset=preset, from_file=from_file)
    check_data(settings["data"], settings["dev_data"])
    stay_offline(settings["data"], settings["dev_data"])

    from ..prepare import check_measurable, load_data, new_classifier, settle, settle_machine

    check_measurable(settings)
    quiet()
    splits, settings = load_data(settle(settings, say, given_in(vars(arguments), read)), say)

    from ..auto import calibrate
    from ..calibration_report import describe, draw
    from ..files import disk_errors
    from ..head_depth import settle_depth
    from ..head_start import start_head
    from ..runs import write_json

    settings = settle_depth(settle_machine(settings, preset, say), splits["train"], preset, say)
    classifier = new_classifier(settings, preset, say)
    start_head(classifier, splits["train"], settings, say)
    found = calibrate(
        classifier,
        splits["train"],
        settings,
        preset,
        batches=arguments.batches,
        directions=arguments.probed,
    )
    folder = Path(arguments.output)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, found.to_dict())
        draw(found, folder / PLOT)
    for warning in found.warnings():
        say(warning)
    print(json.dumps(found.to_dict()) if arguments.json else describe(found))
    say(f"written to {folder}; adazeta train --eps {found.eps:g} --lr {found.lr:g}, or --eps auto --lr auto")
    return 0
