"""Fetch the demo's model and data: ``adazeta fetch``."""

from __future__ import annotations

from . import command, say


def add(commands) -> None:
    """Add the command."""
    command(commands, "fetch", _fetch, "fetch and check the demo's model and data")


def _fetch(arguments) -> int:
    from ..assets import fetch_all

    for name, path in fetch_all(say).items():
        print(f"{name}: {path}")
    return 0
