"""The bytes of a journal: header and records, how they are checked, and what a header must hold.

docs/journal.md describes the format for other programs.
"""

import json
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adazeta_kernels import TTAdapterLayout

from .errors import JournalError
from .estimator import DIFFERENCES
from .update import Step

MAGIC, VERSION = b"AZJ2", 2
FREE_KEYS = ("software", "about", "initial", "initial_sha256")  # what may differ in a header when a run is resumed
HAS_DIGEST, GOES_BACK = 1, 2

_FRAME = struct.Struct("<II")
_HEAD = struct.Struct("<QddddfIIIIIII")
_CRC = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass
class Contents:
    """What a journal holds.

    Args:
        header: the description of the run.
        steps: every whole record.
        ends: byte at which the header ends, then each record.
        chain: checksum of header and records.
        torn: bytes behind the last whole record.
    """

    header: dict
    steps: list[Step]
    ends: list[int]
    chain: int
    torn: int


def header_bytes(header: dict) -> tuple[bytes, int]:
    """Return the bytes that a journal begins with, and their checksum."""
    body = json.dumps(header, sort_keys=True).encode()
    crc = zlib.crc32(body)
    return MAGIC + _FRAME.pack(len(body), crc) + body, crc


def encode(step: Step, chain: int) -> tuple[bytes, int]:
    """Return the record of ``step`` behind records whose checksum is ``chain``, and the checksum with it."""
    if step.back_to is None:
        body = np.asarray(step.coefficients, "<f4").tobytes()
    else:
        body = _U64.pack(step.back_to)
    flags = (HAS_DIGEST if step.digest is not None else 0) | (GOES_BACK if step.back_to is not None else 0)
    head = _HEAD.pack(
        *(step.index, step.lr, step.momentum, step.weight_decay, step.loss, step.spread),
        *(step.rows, step.losses, step.dropped, step.clipped, step.digest or 0, flags, len(body) // 4),
    )
    chain = zlib.crc32(head, chain)
    record = head + _CRC.pack(chain)
    chain = zlib.crc32(body, chain)
    return record + body + _CRC.pack(chain), chain


def _decode(content: memoryview, start: int, chain: int) -> tuple[Step, int, int] | None:
    """Return the record at byte ``start``, its end and the checksum up to there; None where the file ends before it.

    Raises:
        ValueError: damage, without the name of the file.
    """
    first = start + _HEAD.size
    if len(content) < first + _CRC.size:
        return None
    head = content[start:first]
    chain = zlib.crc32(head, chain)
    if not _whole(content, first, chain):
        return None
    *values, rows, losses, dropped, clipped, digest, flags, words = _HEAD.unpack(head)
    first += _CRC.size
    last = first + 4 * words
    if len(content) < last + _CRC.size:
        return None
    body = content[first:last]
    chain = zlib.crc32(body, chain)
    if not _whole(content, last, chain):
        return None
    index, lr, momentum, weight_decay, loss, spread = values
    if flags & ~(HAS_DIGEST | GOES_BACK):
        raise ValueError(f"unknown flags {flags:#x}")
    if not (np.isfinite([lr, weight_decay]).all() and 0 <= momentum < 1):
        raise ValueError(f"lr {lr}, momentum {momentum} and weight decay {weight_decay} are no settings of a step")
    coefficients, back_to = np.frombuffer(body, "<f4"), None
    if flags & GOES_BACK:
        back_to = _U64.unpack(body)[0] if words == 2 else None
        if back_to is None or back_to > index:
            raise ValueError("it goes back to no earlier step")
        coefficients = coefficients[:0]
    elif not np.isfinite(coefficients).all():
        raise ValueError("a coefficient is not finite")
    counts = (rows, losses, dropped, clipped, digest if flags & HAS_DIGEST else None, back_to)
    step = Step(index, lr, momentum, weight_decay, coefficients, loss, spread, *counts)
    return step, last + _CRC.size, chain


def _whole(content: memoryview, at: int, chain: int) -> bool:
    """Tell whether the checksum at byte ``at`` is ``chain``, or one that was never written, as all behind it.

    A file system may lengthen a file before a power failure and never fill it: zeros to the end are a torn tail,
    wherever in a record they begin. What is there of the checksum must be right.

    Raises:
        ValueError: another checksum.
    """
    expected, end = _CRC.pack(chain), at + _CRC.size
    found = bytes(content[at:end])
    if found == expected:
        return True
    if not expected.startswith(found.rstrip(b"\0")) or np.frombuffer(content[end:], np.uint8).any():
        raise ValueError("the checksum differs")
    return False


def parse_header(path: Path, content: memoryview) -> tuple[dict, int, int]:
    """Return the header of a journal, its end and its checksum; ``path`` is what errors call it.

    Raises:
        JournalError: see ``parse``.
    """
    start = len(MAGIC) + _FRAME.size
    magic = bytes(content[: len(MAGIC)])
    if magic != MAGIC or len(content) < start:
        if magic[:3] == MAGIC[:3] and magic != MAGIC:
            raise JournalError(
                f"{path} is a journal of format {magic[3:].decode(errors='replace')}, this program reads {VERSION}",
                offset=0,
                key="version",
            )
        raise JournalError(f"{path} is not a journal of this program (it does not begin with {MAGIC!r})", offset=0)
    length, crc = _FRAME.unpack_from(content, len(MAGIC))
    body = content[start : start + length]
    if len(body) < length or zlib.crc32(body) != crc:
        raise JournalError(
            f"the header of {path} is damaged at byte {start}; the run cannot be replayed from it", offset=start
        )
    try:
        header = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise JournalError(f"the header of {path} is not JSON at byte {start}: {error}", offset=start) from error
    check_header(header, path)
    return header, start + length, crc


def parse(path: Path, content: bytes) -> Contents:
    """Read the bytes of a journal; ``path`` is what errors call it.

    Raises:
        JournalError: damage (``offset`` is the first byte of the record or header that holds it), another version, or
            a header that does not describe a run (``key``).
    """
    view = memoryview(content)
    header, position, chain = parse_header(path, view)
    steps, ends = [], [position]
    while position < len(view):
        try:
            found = _decode(view, position, chain)
            if found is not None and found[0].index != len(steps):
                raise ValueError(f"expected step {len(steps)}, got {found[0].index}")
        except ValueError as error:
            raise JournalError(
                f"{path} is damaged at byte {position} (record {len(steps)}): {error}; `truncate -s {position}` gives "
                "up that step and all after it",
                offset=position,
            ) from error
        if found is None:
            break
        step, position, chain = found
        steps.append(step)
        ends.append(position)
    return Contents(header, steps, ends, chain, len(view) - position)


def _is(value, kind) -> bool:
    return isinstance(value, kind) and not (isinstance(value, bool) and kind is int)


def _list_of(value, kind) -> bool:
    return _is(value, list) and all(_is(entry, kind) for entry in value)


def _is_layout(value) -> bool:
    if not _list_of(value, int):
        return False
    try:
        TTAdapterLayout.decode(value)
    except ValueError:
        return False
    return True


def _is_site(value) -> bool:
    return _is(value, dict) and _is(value.get("name"), str) and _is_layout(value.get("layout"))


def _is_parameter(value) -> bool:
    if not _is(value, dict) or not _list_of(value.get("shape"), int):
        return False
    return _is(value.get("name"), str) and _is(value.get("decayed"), bool) and all(n >= 0 for n in value["shape"])


def _is_init(value) -> bool:
    if value is None:
        return True
    if not _is(value, dict) or value.get("init") not in ("identity", "paper"):
        return False
    return _is_number(value.get("gain")) and _is_seed(value.get("seed"))


def _is_number(value) -> bool:
    """Tell whether a value is a number of float32's range; JSON knows integers beyond any float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2.0**127


def _is_config(value) -> bool:
    if not _is(value, dict) or value.get("perturb") != "in-place":
        return _is(value, dict)
    eps = value.get("eps")  # a replay goes to the probes again
    return _is_number(eps) and eps > 0 and value.get("difference") in DIFFERENCES


def _is_seed(value) -> bool:
    return _is(value, int) and 0 <= value < 2**64


_KEYS = {
    "version": lambda value: value == VERSION and _is(value, int),
    "run_seed": _is_seed,
    "distribution": lambda value: value in ("gaussian", "rademacher"),
    "init": _is_init,
    "sites": lambda value: _is(value, list) and all(map(_is_site, value)),
    "params": lambda value: _is(value, list) and all(map(_is_parameter, value)),
    "initial": lambda value: value in ("seed", "file"),
    "initial_sha256": lambda value: _is(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value)),  # names a file
    "base_sha256": lambda value: _is(value, str),
    "adapter": lambda value: value is None or _is(value, dict),
    "config": _is_config,
    "about": lambda value: _is(value, dict),
    "software": lambda value: _is(value, dict),
}


def check_header(header, path: Path) -> None:
    """Check that ``header`` describes a run.

    Raises:
        JournalError: no JSON object, a missing key, or a value that cannot be; ``key`` names it.
    """
    if not isinstance(header, dict):
        raise JournalError(f"the header of {path} is no JSON object", offset=0)
    for key, allowed in _KEYS.items():
        if key not in header:
            raise JournalError(f"the header of {path} has no {key!r}", key=key)
        if not allowed(header[key]):
            raise JournalError(f"the header of {path}: {key} cannot be {shown(header, key)}", key=key)
    if header["sites"] and header["init"] is None:
        raise JournalError(f"the header of {path}: init is missing, though there are adapters", key="init")
    if header["config"].get("perturb") == "in-place" and not header["params"]:
        raise JournalError(f"the header of {path}: params are missing, though some move in place", key="params")


def difference(found: dict, expected: dict) -> str:
    """Return the first entry of two headers that differs and may not, such as ``config.eps``; or ``""``."""
    for key in sorted((found.keys() | expected.keys()) - set(FREE_KEYS)):
        ours, theirs = found.get(key), expected.get(key)
        if ours != theirs:
            if key in ("config", "adapter", "task") and ours and theirs:
                inner = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
                return f"{key}.{inner[0]}"
            return key
    return ""


def check_same(path: Path, found: dict, expected: dict) -> None:
    """Raise JournalError where :func:`difference` finds one between the journal at ``path`` and a run that resumes."""
    if key := difference(found, expected):
        raise JournalError(
            f"{path} belongs to a run with another {key} ({shown(found, key)}, now {shown(expected, key)}); resume "
            "with the same settings, or choose another folder",
            key=key,
        )


def shown(header: dict, key: str) -> str:
    """Return an entry of a header (``a.b`` for one inside another) in at most 60 characters."""
    outer, _, inner = key.partition(".")
    value = header.get(outer)
    text = repr(value.get(inner) if inner and isinstance(value, dict) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
