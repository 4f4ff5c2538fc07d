"""Runs side by side: the settings that differ, what came of them, and what they cost."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .report import MIB, PARTS, table
from .runs import METRICS, SUMMARY, is_run, read_card, read_json, read_metrics

#: Keys of ``metrics.jsonl`` under one name; the first that a line has counts.
KEYS = {
    "queries": ("zo/queries", "queries"),
    "spread": ("zo/projected_grad_std", "spread"),
    "snr": ("zo/snr",),
    "rows_per_second": ("rows_per_second", "rows_per_s"),
    "peak_mib": ("peak_mib",),
}
#: Cost of a run in ``comparison``: name, heading, how it is written.
COSTS = {
    "steps": ("steps done", "{:,.0f}"),
    "rows": ("forward rows", "{:,.0f}"),
    "losses": ("losses", "{:,.0f}"),
    "seconds": ("seconds", "{:,.1f}"),
    "rows_per_second": ("rows/s", "{:,.1f}"),
    "numbers": ("trained numbers", "{:,.0f}"),
    "peak_mib": ("peak memory, MiB", "{:,.0f}"),
    "above_model_mib": ("peak above the model, MiB", "{:,.0f}"),
}
NOTHING, LONGEST = "-", 48  # in a cell of a table: no value, and the most characters of a setting


@dataclass(frozen=True)
class Record:
    """What a run folder says of itself: its card, its summary (empty until it has ended) and its metrics."""

    name: str
    card: Mapping[str, Any]
    summary: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]

    def series(self, name: str, against: str, kind: str = "train") -> tuple[list[float], list[float]]:
        """Return ``against`` (step, rows or seconds) and ``name`` of every line of a kind that has both."""
        found = [(line.get(against), value_of(line, name)) for line in self.lines if line["kind"] == kind]
        pairs = [(x, y) for x, y in found if isinstance(x, (int, float)) and isinstance(y, (int, float))]
        return [x for x, _ in pairs], [y for _, y in pairs]

    def last(self, name: str) -> float | None:
        """Return the last value of the metrics, None if there is none."""
        values = [value for line in self.lines if (value := value_of(line, name)) is not None]
        return values[-1] if values else None


def value_of(line: Mapping[str, Any], name: str):
    """Return a value of a line of ``metrics.jsonl`` by its name here, None where the line has none."""
    return next((line[key] for key in KEYS.get(name, (name,)) if line.get(key) is not None), None)


def read_record(folder: str | Path, name: str | None = None) -> Record:
    """Read a run, or one that has not ended: ``<folder>.partial``.

    Raises:
        UserError: neither is there, or a file is damaged.
    """
    folder = Path(folder)
    partial = Path(f"{os.path.abspath(folder)}.partial")  # of the folder that one is in, too: `adazeta plot .`
    if not is_run(folder) and is_run(partial):
        folder = partial
    card = read_card(folder)
    summary = read_json(folder / SUMMARY) if (folder / SUMMARY).is_file() else {}
    try:
        lines = read_metrics(folder / METRICS)
        if any(not isinstance(line, dict) or "kind" not in line for line in lines):
            raise ValueError("a line is no object with a kind")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / METRICS} is damaged ({error}): restore it, or leave this run out") from error
    return Record(name or folder.name, card, summary, lines)


def read_records(folders: Sequence[str | Path]) -> list[Record]:
    """Read several runs; those of one name are told apart by their paths.

    Raises:
        UserError: as :func:`read_record`.
    """
    names = [Path(folder).resolve().name for folder in folders]
    shown = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders)]
    return [read_record(folder, name) for folder, name in zip(folders, shown)]


def comparison(records: Sequence[Record]) -> dict:
    """Return what tells runs apart, as plain JSON values.

    Returns:
        ``settings``: the names of those that differ; ``runs``: of each ``name``, ``finished``, ``settings`` (the values
        of those), ``measured`` (``{split: {metric: [before, after]}}``) and ``cost`` (:data:`COSTS`, None where a run
        does not say).
    """
    settings = [_settings(record) for record in records]
    every = dict.fromkeys(key for values in settings for key in values)
    differing = [key for key in every if any(values.get(key) != settings[0].get(key) for values in settings)]
    return {
        "settings": differing,
        "runs": [
            {
                "name": record.name,
                "finished": bool(record.summary),
                "settings": {key: values.get(key) for key in differing},
                "measured": _measured(record),
                "cost": _cost(record),
            }
            for record, values in zip(records, settings)
        ],
    }


def comparison_rows(compared: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of a table of :func:`comparison`: a header, settings, measurements, cost."""
    runs = compared["runs"]
    rows = [("", *(run["name"] + ("" if run["finished"] else " (not ended)") for run in runs))]
    rows += [(key, *(_written(run["settings"][key]) for run in runs)) for key in compared["settings"]]
    measured = dict.fromkeys(
        (split, metric) for run in runs for split in run["measured"] for metric in run["measured"][split]
    )
    for split, metric in measured:
        cells = [_change(metric, run["measured"].get(split, {}).get(metric)) for run in runs]
        rows.append((f"{metric}, {split}", *cells))
    for key, (heading, write) in COSTS.items():
        values = [run["cost"][key] for run in runs]
        if any(value is not None for value in values):
            rows.append((heading, *(NOTHING if value is None else write.format(value) for value in values)))
    return rows


def describe(compared: Mapping[str, Any]) -> str:
    """Return a table of :func:`comparison` as text."""
    return table(comparison_rows(compared))


def _settings(record: Record) -> dict:
    settings = dict(record.card.get("settings") or {})
    return {"preset": record.card.get("preset"), **settings, "dtype": record.card.get("dtype")}


def _measured(record: Record) -> dict:
    """Return ``{split: {metric: [before, after]}}``; of a run that has not ended the evaluations so far."""
    found = {split: record.summary[split] for split in ("test", "dev") if record.summary.get(split)}
    if not record.summary:
        dev = [line for line in record.lines if line["kind"] == "dev"]
        found = {"dev": {"before": dev[0], "after": dev[-1]}} if dev else {}
    about = ("kind", "step", "rows", "seconds")
    return {
        split: {
            metric: [values["before"].get(metric), value]
            for metric, value in values["after"].items()
            if metric not in about and isinstance(value, (int, float))
        }
        for split, values in found.items()
        if values.get("before") and values.get("after")
    }


def _cost(record: Record) -> dict[str, float | None]:
    training, memory = record.summary.get("training", {}), record.summary.get("memory") or {}
    above = memory.get("training_bytes")
    peaks = record.series("peak_mib", "step")[1]
    return {
        "steps": training.get("steps", record.last("step")),
        "rows": training.get("rows", record.last("rows")),
        "losses": training.get("losses"),
        "seconds": training.get("seconds", record.last("seconds")),
        "rows_per_second": training.get("rows_per_s", record.last("rows_per_second")),
        "numbers": record.summary.get("adapter", {}).get("numbers"),
        "peak_mib": max(peaks, default=None),
        "above_model_mib": None if above is None else above / MIB,
    }


def _written(value: Any) -> str:
    if value is None:
        return NOTHING
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _change(metric: str, pair: Sequence[float | None] | None) -> str:
    if pair is None:
        return NOTHING
    write = "{:.1%}" if metric in PARTS else "{:.3f}"
    return " -> ".join(NOTHING if value is None else write.format(value) for value in pair)
