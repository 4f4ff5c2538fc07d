"""Draw runs: ``adazeta plot``."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from . import command

SUFFIXES = (".png", ".html")


def add(commands) -> None:
    """Add the command."""
    plot = command(
        commands, "plot", _plot, "curves of runs: loss, accuracy, queries, spread of projected gradients, memory"
    )
    plot.add_argument("names", metavar="RUN", nargs="+", help="run folders; one that still trains is fine")
    plot.add_argument(
        "--output",
        metavar="FILE",
        default="plot",
        help="a .png, or an .html that opens without a server; both kinds if it ends in neither (default: plot)",
    )


def _plot(arguments) -> int:
    from ..compare import read_records
    from ..page import write_page
    from ..plots import draw_runs

    output = Path(arguments.output)
    if output.name in ("", ".."):
        raise UserError(f"--output must name a file, got the folder {str(output)!r}")
    if output.suffix and output.suffix.lower() not in SUFFIXES:
        raise UserError(f"--output must end in {' or '.join(SUFFIXES)}, or in neither for both, got {output.name!r}")
    records = read_records(arguments.names)
    writers = {".png": draw_runs, ".html": write_page}
    for suffix in [output.suffix.lower()] if output.suffix else SUFFIXES:
        path = output if output.suffix else output.with_name(output.name + suffix)
        writers[suffix](records, path)
        print(path)
    return 0
