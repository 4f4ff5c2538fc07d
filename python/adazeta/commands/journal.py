"""Look into journals: ``adazeta journal stats`` and ``adazeta journal diff``."""

from __future__ import annotations

import json

from ..errors import UserError
from . import DIFFERENT, command


def add(commands) -> None:
    """Add the command and its actions."""
    journal = command(commands, "journal", _journal, "look into journals, or compare two")
    actions = journal.add_subparsers(title="actions", metavar="ACTION", help="stats or diff")
    stats = command(actions, "stats", _journal_stats, "what a journal records: settings, steps, losses, cost")
    stats.add_argument("name", metavar="RUN", help="run folder, or a journal")
    stats.add_argument("--json", action="store_true", help="print one JSON object (default: off)")
    difference = command(actions, "diff", _journal_diff, "where two runs part: settings, and the first step")
    difference.add_argument("name", metavar="A", help="run folder, or a journal")
    difference.add_argument("other", metavar="B", help="run folder, or a journal")


def _journal(arguments) -> int:
    raise UserError("adazeta journal: expected an action, stats or diff; see adazeta journal --help")


def _journal_stats(arguments) -> int:
    from ..journal_tools import describe, statistics

    found = statistics(arguments.name)
    print(json.dumps(found) if arguments.json else describe(found))
    return 0


def _journal_diff(arguments) -> int:
    from ..journal_tools import compare

    lines, same = compare(arguments.name, arguments.other)
    print("\n".join(lines))
    return 0 if same else DIFFERENT
