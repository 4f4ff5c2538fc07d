"""Rebuild an adapter from its journal: ``adazeta replay``."""

from __future__ import annotations

from pathlib import Path

from . import DIFFERENT, command


def add(commands) -> None:
    """Add the command."""
    replay = command(commands, "replay", _replay, "rebuild a run's adapter from its journal and compare, bit for bit")
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


def _replay(arguments) -> int:
    from ..journal_tools import replay_run

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
