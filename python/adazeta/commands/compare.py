"""Runs side by side: ``adazeta compare``."""

from __future__ import annotations

import json

from . import command


def add(commands) -> None:
    """Add the command."""
    compare = command(commands, "compare", _compare, "runs side by side: settings that differ, results, cost")
    compare.add_argument("names", metavar="RUN", nargs="+", help="run folders; one that still trains is fine")
    compare.add_argument("--json", action="store_true", help="print one JSON object (default: off)")


def _compare(arguments) -> int:
    from ..compare import comparison, describe, read_records

    found = comparison(read_records(arguments.names))
    print(json.dumps(found, ensure_ascii=False) if arguments.json else describe(found))
    return 0
