"""Read rows of named columns: CSV, TSV, JSON lines, Parquet, folders of ``datasets``, datasets of the hub.

Every reader yields ``(where, row)``: words that name the row's place in an error, and a dict. ``datasets`` is loaded
only for what needs it; no code that comes with a dataset is run.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from adazeta.errors import UserError

HUB = "hub:"
KINDS = "a .csv, .tsv, .jsonl or .parquet file, a folder that `datasets` saved, hub:OWNER/NAME or 'movies'"
_LOADED = "pip install 'adazeta-kernels[data]'"
Rows = Iterable[tuple[str, dict]]
_LONGEST = 2**31 - 1  # letters of a cell
_QUOTED = re.compile('"(?:[^"]|"")*"')


def read_rows(source: str | Path, split: str | None = None, *, say=lambda line: None) -> Iterator[tuple[str, dict]]:
    """Yield the rows of a source, in their order.

    Args:
        source: a file, a folder of ``datasets.save_to_disk``, or ``hub:OWNER/NAME[:CONFIG][@REVISION]``.
        split: the part of a folder or hub dataset that has several; a file has none, and a dataset without splits is
            one part.
        say: told what is being fetched.

    Raises:
        UserError: no such source or split, a file that cannot be read, or a package that is missing.
    """
    check_source(source)
    if str(source).startswith(HUB):
        yield from _hub_rows(str(source), split, say)
        return
    path = Path(source).expanduser()
    if path.is_dir():
        yield from _folder_rows(path, split)
        return
    try:
        yield from _READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read ({error}): save it as UTF-8 text") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def check_source(source: str | Path) -> None:
    """Raise UserError where ``source`` is no data by its name: at once, before a model is loaded for it."""
    path = Path(source).expanduser()
    if str(source).startswith(HUB) or path.is_dir():
        return
    if path.exists() and not path.is_file():  # `<(zcat rows.gz)`, for example
        raise UserError(f"{path} is a pipe or a device, and data is read more than once: save it first; give {KINDS}")
    if not path.is_file():
        raise UserError(f"no such data file: {path}; give {KINDS}")
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{path}: unknown kind of data file {path.suffix!r}; give {KINDS}")


def _csv_rows(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        yield from _named(path, _csv_cells(path, stream), "put text with commas in quotation marks")


def _csv_cells(path: Path, stream: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST))  # one for the whole process: it is only raised
    reader, last = csv.reader(stream, strict=True), 0  # strict: else a lone quotation mark swallows what follows
    try:
        for cells in reader:
            yield (last := reader.line_num), cells
    except csv.Error as error:
        raise UserError(
            f"{path}, line {last + 1}: not CSV ({error}): a cell with quotation marks stands in quotation marks, and "
            "its own are doubled"
        ) from error


def _tsv_rows(path: Path) -> Rows:
    """Yield a row a line: many files of this kind quote nothing, and a text may begin with a quotation mark.

    A cell that is quoted from end to end, as spreadsheets and ``adazeta predict`` write it, is unquoted all the same.
    """
    with path.open(encoding="utf-8-sig", newline="") as stream:
        lines = ((number, line.rstrip("\r\n")) for number, line in enumerate(stream, 1))
        rows = ((number, [_unquoted(cell) for cell in line.split("\t")]) for number, line in lines if line)
        yield from _named(path, rows, "in a .tsv a row is a line, and no cell holds a tab", full=True)


def _named(path: Path, rows: Iterator[tuple[int, list[str]]], advice: str, *, full: bool = False) -> Rows:
    """Yield numbered rows of cells by the names in the first; where they are ``full``, none may have fewer cells."""
    rows = (row for row in rows if row[1])
    _, header = next(rows, (0, []))
    if repeated := [name for name, count in Counter(header).items() if count > 1]:
        raise UserError(f"{path}: more than one column is named {repeated[0]!r}: rename or remove all but one")
    for number, cells in rows:
        where = f"{path}, line {number}"
        if len(cells) > len(header) or full and len(cells) < len(header):
            what = "more" if len(cells) > len(header) else "fewer"
            counts = f"{len(cells)} for {len(header)}"
            raise UserError(f"{where}: {what} cells than the header has columns, {counts}: {advice}")
        yield where, dict(zip(header, cells))


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if _QUOTED.fullmatch(cell) else cell


def _json_rows(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not JSON ({error}): put one object on each line") from error
            if not isinstance(row, dict):
                raise UserError(f'{where}: expected an object such as {{"text": ..., "label": ...}}')
            yield where, row


def _parquet_rows(path: Path) -> Rows:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet files need the package pyarrow: {_LOADED}") from error
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except pyarrow.lib.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file, or damaged: {_first_line(error)}") from error


_READERS = {".csv": _csv_rows, ".tsv": _tsv_rows, ".parquet": _parquet_rows}
_READERS |= {".jsonl": _json_rows, ".ndjson": _json_rows}


def _datasets(what: str):
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{what} needs the package datasets: {_LOADED}") from error
    datasets.disable_progress_bars()
    return datasets


def _folder_rows(folder: Path, split: str | None) -> Rows:
    if not any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        raise UserError(f"{folder} is not a folder that `datasets` saved (save_to_disk); give {KINDS}")
    datasets = _datasets(f"{folder}")
    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder} cannot be read, it may be damaged: {_first_line(error)}") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UserError(f"{folder} has no split {split!r}: choose one of {', '.join(found)} with --split")
        found = found[split]
    yield from _dataset_rows(found, datasets, f"{folder}{f', {split}' if split else ''}")


def _hub_rows(source: str, split: str | None, say) -> Rows:
    name, _, revision = source.removeprefix(HUB).partition("@")
    name, _, config = name.partition(":")
    datasets = _datasets(source)
    say(f"reading {source}{f', split {split}' if split else ''}")
    try:
        found = datasets.load_dataset(name, config or None, split=split, revision=revision or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        offline = isinstance(error, ConnectionError) and not isinstance(error, datasets.exceptions.DatasetsError)
        advice = "; it is fetched once, and needs the network (and HF_HUB_OFFLINE unset) then" if offline else ""
        raise UserError(f"{source} cannot be had from the hub: {_first_line(error)}{advice}") from error
    if isinstance(found, datasets.DatasetDict):
        raise UserError(f"{source} has several splits: choose one of {', '.join(found)} with --split")
    yield from _dataset_rows(found, datasets, f"{source}{f', {split}' if split else ''}")


def _dataset_rows(dataset, datasets, where: str) -> Rows:
    """Yield rows with the names of classes in place of their numbers; -1, no class, stays."""
    classes = {
        column: dict(enumerate(feature.names))
        for column, feature in dataset.features.items()
        if isinstance(feature, datasets.ClassLabel) and feature.names
    }
    for number, row in enumerate(dataset, 1):
        named = {column: names.get(row[column], row[column]) for column, names in classes.items()}
        yield f"{where}, row {number}", {**row, **named}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
