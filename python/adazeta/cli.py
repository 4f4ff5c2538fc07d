"""The ``adazeta`` command: what its commands share. Each is a file in ``commands/``.

What a person can put right is one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from adazeta import __version__, commands
from adazeta.commands import (
    FAILED,
    INTERRUPTED,
    calibrate,
    compare,
    eval,
    export,
    fetch,
    info,
    journal,
    plot,
    predict,
    push,
    replay,
    templates,
    train,
)
from adazeta.errors import ToldEverywhere, UserError
from adazeta.memory import bound_prepared_products

COMMANDS = [train, calibrate, eval, predict, templates, export, push, info, compare, plot, replay, journal, fetch]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit status: 0, 1 (numbers that differ), 2 (an error), 130 (Ctrl-C)."""
    parser = build_parser()
    arguments, more = parser.parse_known_args(argv)
    # argparse takes `predict RUN --json TEXT` for a command without texts, for they may be left out.
    if more and not (hasattr(arguments, "text") and all(text == "-" or not text.startswith("-") for text in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        arguments.text += more
    if arguments.run is None:
        parser.print_help()
        return FAILED
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bound_prepared_products()
    if not arguments.may_go_online:
        commands.stay_offline()
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    try:
        status = arguments.run(arguments) or 0
        sys.stdout.flush()  # what cannot be written any more is told below, not as Python ends
        return status
    except UserError as error:
        if arguments.debug:
            raise
        close_bars()
        if first or not isinstance(error, ToldEverywhere):
            print(f"adazeta: error: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    except (RuntimeError, MemoryError) as error:
        from adazeta.planner import is_out_of_memory

        if arguments.debug or not is_out_of_memory(error):
            raise
        close_bars()
        print(
            f"adazeta: error: out of memory ({' '.join(str(error).split())[:200]}): take shorter texts (--max-tokens), "
            "a smaller --batch-size or --eval-batch-size, or --dtype mixed",
            file=sys.stderr,
        )
        return FAILED
    except KeyboardInterrupt:
        close_bars()
        if first:
            print("adazeta: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `head` does
        _drop_output()
        return 0
    except OSError as error:  # of what `> FILE` writes: other files are told of by name where they are written
        if arguments.debug or error.filename or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        close_bars()
        _drop_output()
        advice = "make room there and run the command again"
        print(f"adazeta: error: cannot write the output: {error.strerror}: {advice}", file=sys.stderr)
        return FAILED


def _drop_output() -> None:
    """Let what stdout still holds go nowhere, so that Python does not fail over it as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="adazeta", description="Fine-tune language models by forward passes alone.")
    parser.add_argument("--version", action="version", version=f"adazeta {__version__}")
    parser.set_defaults(run=None, debug=False, may_go_online=False)
    known = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in COMMANDS:
        module.add(known)
    return parser


def close_bars() -> None:
    """Close progress bars that an error left open, so that what follows begins on a line of its own."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        bars = list(getattr(tqdm, "_instances", []))
        for bar in bars:
            bar.close()
        if len(bars) > 1 and sys.stderr.isatty():  # one inside another leaves the cursor on the outer one's line
            print(file=sys.stderr)
