"""Settings for public datasets by name: prompts, columns, label words and metrics, from ``templates.yaml``."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Any

from adazeta.errors import UserError

PATH = Path(__file__).with_name("templates.yaml")


@cache
def entries() -> dict[str, dict[str, Any]]:
    """Return the settings of every dataset as the file has them; keys are those of the flags, and ``about``."""
    import yaml

    return yaml.safe_load(PATH.read_text(encoding="utf-8"))


def entry(name: str) -> dict[str, Any]:
    """Return the settings of one dataset; ``SST-2`` and ``sst2`` are the same name.

    Raises:
        UserError: no such dataset; near names are named.
    """
    plain = "".join(letter for letter in str(name).lower() if letter.isalnum())
    if plain not in entries():
        near = difflib.get_close_matches(plain, entries(), n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else "`adazeta templates` lists them"
        raise UserError(f"no template for a dataset named {name!r}: {advice}")
    return entries()[plain]


def shown(name: str) -> str:
    """Return one entry as the file has it, which is a file of settings that ``--config`` reads."""
    from adazeta.options import TRAIN

    settings, known = entry(name), {option.name for option in TRAIN}
    (key,) = (key for key, value in entries().items() if value is settings)
    text = PATH.read_text(encoding="utf-8").split(f"\n{key}:\n")[1].split("\n\n")[0]
    lines = [line.removeprefix("  ") for line in text.rstrip().splitlines()]
    return "\n".join(line if line.partition(":")[0] in known else f"# {line}" for line in lines)


def listed() -> str:
    """Return a table: name, kind of task, metric and what every dataset is."""
    rows = [(name, e.get("task", "label-words"), e["metric"], e["about"]) for name, e in entries().items()]
    rows.insert(0, ("name", "task", "metric", "what it is"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows)
