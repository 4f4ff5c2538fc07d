"""The journal of a run: per step the coefficients and the learning rate, from which the run can be done again.

A file is a header and records, each checked by a CRC-32. A step costs ``40 + 4 x queries`` bytes. All integers are
little-endian::

    header: b"AZJ1"  u32 length  u32 crc32  JSON in UTF-8
    record: u32 length  u32 crc32  payload = u64 step  f64 lr  f64 momentum  f64 weight_decay  f32 x queries
"""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from adazeta_kernels import TTAdapterLayout

from .errors import UserError
from .files import replacing
from .tuner.init import initial_theta
from .update import Step, Trainable, apply_step

MAGIC = b"AZJ1"
NAME = "journal.azj"
INITIAL_NAME = "journal-initial.safetensors"
_FRAME = struct.Struct("<II")
_STEP = struct.Struct("<Qddd")


def sha256_of(tensors: list[torch.Tensor]) -> str:
    """Return the SHA-256 of the tensors' bytes, one after another."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Journal:
    """An open journal that records steps as they are made.

    ``append`` hands the record to the operating system before it returns; if that fails (a full disk), the file is cut
    back to the last whole record and the error names the file.
    """

    def __init__(self, path: Path, header: dict, records: list[Step], size: int):
        self.path, self.header = path, header
        self.next_step = records[-1].index + 1 if records else 0
        self._file = open(path, "r+b", buffering=0)
        self._file.truncate(size)
        self._file.seek(size)

    @classmethod
    def create(cls, path: str | os.PathLike, header: dict, initial: dict[str, torch.Tensor] | None) -> "Journal":
        """Start a journal at ``path``, replacing an older one; ``initial`` holds numbers that no seed rebuilds."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        body = json.dumps(header, sort_keys=True).encode()
        content = MAGIC + _FRAME.pack(len(body), zlib.crc32(body)) + body
        initial_path = path.with_name(INITIAL_NAME)
        if initial:
            with replacing(initial_path) as temporary:
                save_file({name: t.detach().cpu().contiguous() for name, t in initial.items()}, temporary)
        else:
            initial_path.unlink(missing_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        return cls(path, header, [], len(content))

    @classmethod
    def resume(cls, path: str | os.PathLike, header: dict, step: int) -> "Journal":
        """Open the journal of an interrupted run that goes on at ``step``; later records are cut off.

        Raises:
            UserError: the file belongs to a run with other settings, or holds fewer than ``step`` steps.
        """
        path = Path(path)
        found, records, _ = read(path, repair=True)
        for key in sorted(set(found) | set(header)):
            if found.get(key) != header.get(key) and not key.startswith("initial"):
                raise UserError(
                    f"{path} belongs to a run with another {key}; resume with the same settings, "
                    "or choose another folder"
                )
        kept = [(record, end) for record, end in records if record.index < step]
        if len(kept) < step:
            raise UserError(f"{path} holds {len(kept)} steps, but the checkpoint is at step {step}; it was cut short")
        size = kept[-1][1] if kept else _header_size(path)
        return cls(path, found, [record for record, _ in kept], size)

    def append(self, step: Step) -> None:
        """Record ``step``; raises ``UserError`` when it can't be written, and the file keeps its whole records."""
        if step.index != self.next_step:
            raise ValueError(f"expected step {self.next_step} to be recorded next, got {step.index}")
        payload = _STEP.pack(step.index, step.lr, step.momentum, step.weight_decay)
        payload += struct.pack(f"<{len(step.coefficients)}f", *step.coefficients)
        record = _FRAME.pack(len(payload), zlib.crc32(payload)) + payload
        size = self._file.tell()
        try:
            written = self._file.write(record)
            if written != len(record):
                raise OSError(28, "No space left on device")
        except OSError as error:
            self._file.truncate(size)
            self._file.seek(size)
            raise UserError(f"cannot write {self.path}: {error.strerror}; free some space and resume") from error
        self.next_step += 1

    def close(self) -> None:
        self._file.close()


def _header_size(path: Path) -> int:
    with open(path, "rb") as file:
        start = file.read(len(MAGIC) + _FRAME.size)
    return len(start) + _FRAME.unpack(start[len(MAGIC) :])[0]


def read(path: str | os.PathLike, repair: bool = False) -> tuple[dict, list[tuple[Step, int]], int]:
    """Return header, ``(step, end offset)`` of every record, and the number of bytes after the last whole record.

    Raises:
        UserError: not a journal, a damaged header or record, or a cut last record (unless ``repair``).
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the journal {path}: {error.strerror}") from error
    frame = content[len(MAGIC) : len(MAGIC) + _FRAME.size]
    if content[: len(MAGIC)] != MAGIC or len(frame) < _FRAME.size:
        raise UserError(f"{path} is not a journal of this program (it does not begin with {MAGIC!r})")
    length, crc = _FRAME.unpack(frame)
    position = len(MAGIC) + _FRAME.size
    body = content[position : position + length]
    if len(body) < length or zlib.crc32(body) != crc:
        raise UserError(f"the header of {path} is damaged; the run cannot be replayed from it")
    header, position = json.loads(body), position + length
    records = []
    while position < len(content):
        frame = content[position : position + _FRAME.size]
        length, crc = _FRAME.unpack(frame) if len(frame) == _FRAME.size else (len(content), 0)
        payload = content[position + _FRAME.size : position + _FRAME.size + length]
        if len(payload) < length:
            if repair:
                break
            raise UserError(
                f"{path} is cut off inside the record after step {len(records) - 1}; `adazeta train --resume` goes on "
                "from the last checkpoint"
            )
        if zlib.crc32(payload) != crc or length < _STEP.size or (length - _STEP.size) % 4:
            raise UserError(f"{path} is damaged at byte {position} (record {len(records)}); the checksum differs")
        values = struct.unpack(f"<{(length - _STEP.size) // 4}f", payload[_STEP.size :])
        position += _FRAME.size + length
        records.append((Step(*_STEP.unpack(payload[: _STEP.size]), values), position))
    return header, records, len(content) - position


def steps(path: str | os.PathLike) -> Iterator[Step]:
    """Yield the recorded steps of a journal."""
    for step, _ in read(path)[1]:
        yield step


def rebuild_initial(header: dict) -> torch.Tensor:
    """Return the initial flat ``theta`` of the adapter that ``header`` describes, from its seed alone."""
    parts, offset = [], 0
    for site in header["sites"]:
        layout = TTAdapterLayout.decode(site["layout"])
        init = header["init"]
        parts.append(initial_theta(layout, init=init["init"], gain=init["gain"], seed=init["seed"], offset=offset))
        offset += layout.numel
    return torch.cat(parts) if parts else torch.empty(0)


def decayed_views(theta: torch.Tensor, layouts: list[TTAdapterLayout]) -> list[torch.Tensor]:
    """Return the parts of ``theta`` that are not biases, as views."""
    views, offset = [], 0
    for layout in layouts:
        for segment in layout.segments():
            if not segment.is_bias:
                first = offset + segment.offset
                views.append(theta[first : first + segment.numel])
        offset += layout.numel
    return views


def replay(folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Return the trained tensors of the run in ``folder``, rebuilt from its journal, named as in the saved adapter.

    Only the journal is read (and the initial values beside it, for numbers that no seed makes); neither the base model
    nor the data is needed. The result is bit-identical to what training left.

    Raises:
        UserError: no journal, a damaged or cut one, or initial values that do not match it.
    """
    path = Path(folder) / NAME if Path(folder).is_dir() else Path(folder)
    header, records, _ = read(path)
    tensors: dict[str, torch.Tensor] = {}
    decayed: list[torch.Tensor] = []
    if header["initial"] == "file":
        initial_path = path.with_name(INITIAL_NAME)
        try:
            stored = load_file(initial_path)
        except Exception as error:
            raise UserError(f"cannot read {initial_path}, which the replay needs: {error}") from error
    else:
        stored = {}
    flat = []
    if header["sites"]:
        theta = stored["theta"] if "theta" in stored else rebuild_initial(header)
        layouts = [TTAdapterLayout.decode(site["layout"]) for site in header["sites"]]
        offset = 0
        for site, layout in zip(header["sites"], layouts):
            tensors[site["name"]] = theta[offset : offset + layout.numel]
            offset += layout.numel
        decayed += decayed_views(theta, layouts)
        flat.append(theta)
    for parameter in header["params"]:
        tensor = stored[parameter["name"]]
        tensors[parameter["name"]] = tensor
        flat.append(tensor)
        if parameter["decayed"]:
            decayed.append(tensor)
    if sha256_of(flat) != header["initial_sha256"]:
        raise UserError(f"the initial values rebuilt for {path} differ from those of the run; was the file changed?")
    trainable = Trainable(flat, decayed)
    for step, _ in records:
        apply_step(trainable, step, header["run_seed"], header["distribution"])
    return tensors
