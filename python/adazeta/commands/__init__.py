"""The commands of ``adazeta``, one file each: ``add(commands)`` gives the parser its flags, ``run`` does the work.

torch and transformers are imported when a command runs, so that help is there at once. Results go to stdout, progress
and notes to stderr.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from .. import hub_models
from ..rows import HUB, check_source

INTERRUPTED, FAILED, DIFFERENT = 130, 2, 1  # exit statuses


def command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    """Add a command to the parser and return its own; ``run(arguments)`` returns the exit status, None for 0."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--debug", action="store_true", help="show where an error came from (default: off)")
    parser.set_defaults(run=run)
    return parser


def say(line: str) -> None:
    """Print a note to stderr, where progress goes."""
    print(line, file=sys.stderr, flush=True)


def stay_offline(*sources: str | None) -> None:
    """Let nothing be looked up on the hub, unless one of the sources of data is there; a model is fetched all the same.

    Libraries read this when they are imported.
    """
    if not any(str(source).startswith(HUB) for source in sources) and "HF_HUB_OFFLINE" not in os.environ:
        os.environ["HF_HUB_OFFLINE"] = "1"
        hub_models.kept_offline = True


def check_data(*sources: str | None) -> None:
    """Raise UserError where a source of data is not there: before libraries and a model are loaded for it."""
    for source in sources:
        if source not in (None, "movies"):
            check_source(source)


def quiet() -> None:
    """Keep the libraries' own bars and notes off the terminal."""
    import warnings

    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")  # missing keys: told as an error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
