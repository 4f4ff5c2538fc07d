"""Tables and summaries: what a run says at its end, as text and as ``summary.json``."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adazeta import __version__

MIB = 1 << 20
PARTS = ("accuracy", "f1", "exact_match")  # metrics that are parts of one


def table(rows: Sequence[Sequence[str]], *, header: bool = True) -> str:
    """Return rows as aligned columns: the first to the left, the others to the right, a rule below the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join(cells).rstrip())
        if header and number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Return ``name  value`` lines with the values aligned."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in pairs)


def mib(count: int) -> str:
    """Return a number of bytes in MiB."""
    return f"{count / MIB:,.1f} MiB"


def before_after(rows: Sequence[tuple[str, Mapping[str, float], Mapping[str, float]]]) -> str:
    """Return the accuracy, the loss and what else was measured of each split, before and after.

    Args:
        rows: ``(name of the split, metrics before, metrics after)`` with ``accuracy`` and ``loss``.
    """
    lines = [("", "before", "after", "change")]
    for name, before, after in rows:
        for key in [key for key in before if key in after]:
            old, new = before[key], after[key]
            if key in PARTS:
                cells = f"{old:.1%}", f"{new:.1%}", f"{100 * (new - old):+.1f} pp"
            else:
                cells = f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}"
            lines.append((f"{key.replace('_', ' ')}, {name}", *cells))
    return table(lines)


def adapter_size(folder: Path) -> dict[str, int]:
    """Return the adapter's numbers and bytes, from the file's header, and the journal's bytes."""
    from safetensors import safe_open

    from adazeta.journal import NAME
    from adazeta.runs import ADAPTER

    numbers = tensors = 0
    with safe_open(folder / ADAPTER, framework="np") as stored:
        for name in stored.keys():  # noqa: SIM118
            size = 1
            for dimension in stored.get_slice(name).get_shape():
                size *= dimension
            numbers, tensors = numbers + size, tensors + 1
    journal = folder / NAME
    return {
        "numbers": numbers,
        "tensors": tensors,
        "file_bytes": (folder / ADAPTER).stat().st_size,
        "journal_bytes": journal.stat().st_size if journal.is_file() else 0,
    }


def digests(folder: Path, card: Mapping[str, Any]) -> dict[str, str]:
    """Return what tells two runs apart: SHA-256 of adapter, journal and settings, and the journal's own digests."""
    from safetensors.torch import load_file

    from adazeta.digests import json_sha256, sha256_of
    from adazeta.journal import NAME, read
    from adazeta.runs import ADAPTER

    adapter = load_file(folder / ADAPTER)
    found = {
        "adapter_sha256": sha256_of([adapter[name] for name in sorted(adapter)]),
        "settings_sha256": json_sha256(card["settings"]),
    }
    if (folder / NAME).is_file():
        header = read(folder / NAME).header
        found["journal_sha256"] = hashlib.sha256((folder / NAME).read_bytes()).hexdigest()
        found |= {key: header[key] for key in ("base_sha256", "initial_sha256")}
        found["config_sha256"] = json_sha256(header["config"])
    return found


def machine() -> dict[str, Any]:
    """Return what a timing depends on: device, threads and versions."""
    import peft
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "adazeta": __version__,
    }


def training_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the lines of a summary that say what training cost and how large the adapter is."""
    training, adapter = summary["training"], summary["adapter"]
    lines = [
        ("training", f"{training['steps']:,} steps, {training['rows']:,} forward rows, {training['losses']:,} losses"),
        ("time", f"{training['seconds']:,.0f} s without evaluations, {training['rows_per_s']:.1f} rows/s"),
    ]
    if real := training.get("real_tokens"):
        lines.append(("tokens", f"{training['tokens']:,}, {training['tokens'] / real:.3f} for each that is no padding"))
    if (prefix := summary.get("prefix")) and prefix["hits"]:
        met = prefix["hits"] + prefix["misses"]
        kept = f"known for {prefix['hits']:,} of {met:,} examples, {mib(prefix['bytes'])} kept"
        lines.append(("blocks below the adapters", kept))
    if privacy := summary.get("privacy"):
        spent = (
            f"epsilon {privacy['epsilon']:.3g} at delta {privacy['delta']:g}, for the {privacy['examples']:,} examples"
        )
        lines.append(("privacy", spent))
    if training["dropped"]:
        lines.append(("dropped queries", f"{training['dropped']:,} (their losses were not finite)"))
    if memory := summary.get("memory"):
        exact = "" if memory["exact"] else " (upper bound: this system does not let the mark be reset)"
        extra, allowed = memory["over_frozen_bytes"], memory["allowed_bytes"]
        lines += [
            ("peak memory above the model", f"{mib(memory['training_bytes'])} while training{exact}"),
            ("  of the same rows, frozen", f"{mib(memory['frozen_bytes'])} for the base model's forward alone"),
            ("  one estimate", f"{mib(memory['estimate_bytes'])}: {mib(extra)} more (allowed: {mib(allowed)})"),
        ]
    lines.append(
        ("adapter", f"{adapter['numbers']:,} numbers in {adapter['tensors']} tensors, {adapter['file_bytes']:,} bytes")
    )
    lines.append(("journal", f"{adapter['journal_bytes']:,} bytes; `adazeta replay` rebuilds the adapter from it"))
    return lines
