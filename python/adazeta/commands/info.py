"""Look at a run, a model or a width: ``adazeta info``."""

from __future__ import annotations

from ..options import PLAN, add_options, resolve
from . import command, quiet, say


def add(commands) -> None:
    """Add the command."""
    info = command(commands, "info", _info, "what a run, a model or a width holds: sizes, shapes, sites")
    info.add_argument("name", metavar="WHAT", help="run, base model (as --model of train), or a width such as 4096")
    info.add_argument("--rank", type=int, default=5, metavar="N", help="TT rank, for a width or model (default: 5)")
    info.add_argument(
        "--bottleneck", type=int, default=64, metavar="N", help="adapter bottleneck, for a width or model (default: 64)"
    )

    info.add_argument(
        "--plan", action="store_true", help="for a model: the memory that training will take (default: off)"
    )
    add_options(info, {"with --plan": PLAN})


def _info(arguments) -> int:
    from ..info import describe
    from ..memory_plan import describe_plan

    quiet()
    sizes = {"rank": arguments.rank, "bottleneck": arguments.bottleneck, "say": say}
    if arguments.plan:
        print(describe_plan(arguments.name, **sizes, **resolve(vars(arguments), PLAN)))
        return 0
    print(describe(arguments.name, **sizes))
    return 0
