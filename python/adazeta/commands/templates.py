"""Look at the settings for public datasets: ``adazeta templates``."""

from __future__ import annotations

from . import command


def add(commands) -> None:
    """Add the command."""
    templates = command(commands, "templates", _templates, "list the settings for public datasets, or show one")
    templates.description += (
        " `adazeta train --dataset-template sst2 --shots 16` takes task, template, label words, columns and metric from"
        " an entry; every flag overrides its own. `adazeta templates sst2 > sst2.yaml` gives a file to change, for"
        " --config."
    )
    templates.add_argument("name", nargs="?", metavar="NAME", help="a dataset, such as sst2 (default: list all)")


def _templates(arguments) -> int:
    from ..tasks.templates import listed, shown

    print(shown(arguments.name) if arguments.name else listed())
    return 0
