"""Keep the hidden states below the first adapter across epochs, in memory or on disk, within a number of bytes.

A cache maps a key (the bytes of what names an example) to a tensor ``[tokens, width]``. It is a convenience, never a
source of errors: what it cannot keep or no longer has is computed again by the same function (``adazeta.prefix``).
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from .memory import available_bytes, read_size

_log = logging.getLogger("adazeta")
_MAGIC = b"AZPREFX1"
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
_NAME = re.compile("[0-9a-f]{64}")  # of a folder: a model's digest
SHARE = 4  # a cache without a limit of its own takes one part in so many of what is free


def read_setting(value: str) -> tuple[str, int | None]:
    """Return kind and limit in bytes of ``auto``, ``off``, ``memory[:SIZE]`` or ``disk[:SIZE]``.

    Raises:
        ValueError: anything else; a size is a number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB.
    """
    kind, colon, size = str(value).partition(":")
    if kind not in ("memory", "disk") and (kind not in ("auto", "off") or colon):
        raise ValueError(f"expected auto, off, memory, disk, memory:SIZE or disk:SIZE such as disk:2GiB, got {value!r}")
    return kind, read_size(size) if colon else None


def cache_of(setting: str, folder: str | os.PathLike) -> "MemoryCache | DiskCache | None":
    """Return the cache that a setting asks for, None for ``off``; ``auto`` is ``memory``.

    Args:
        setting: see :func:`read_setting`; without a size a quarter of what is free.
        folder: where caches on disk live.
    """
    kind, limit = read_setting(setting)
    if kind == "off":
        return None
    if kind == "disk":
        return DiskCache(folder, limit)
    return MemoryCache(available_bytes() // SHARE if limit is None else limit)


class MemoryCache:
    """Least recently used tensors go first, but only once nothing that is kept is asked for any more.

    An epoch asks for every example once, in an order of its own. With room for a share c of them, plain replacement
    of the least recently used would answer about c^2 / 2 of the questions: most leave just before they are wanted. So
    a tensor only makes room after as many misses in a row as there are tensors kept.

    Args:
        limit: bytes of tensor data.
    """

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._misses = 0

    def describe(self) -> str:
        """Say where tensors are kept and how many bytes of them."""
        return f"up to {self.limit / 2**20:,.0f} MiB of memory"

    def open(self, identity: Callable[[], str]) -> None:
        """Forget everything: the model is not the one the tensors came from."""
        self._kept.clear()
        self.bytes = self._misses = 0

    def get(self, key: bytes) -> torch.Tensor | None:
        """Return the tensor kept under ``key``, or None."""
        if key not in self._kept:
            self._misses += 1
            return None
        self._misses = 0
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, key: bytes, value: torch.Tensor) -> None:
        """Keep ``value`` (on the CPU) if there is room, or if what is kept has been of no use lately."""
        size = value.nbytes
        if size > self.limit or key in self._kept:
            return
        while self.bytes + size > self.limit:
            if self._misses <= len(self._kept):
                return
            self.bytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept[key] = value
        self.bytes += size


class DiskCache:
    """One file per tensor in a folder per model; processes may share it, runs find it again.

    A file is written aside and renamed. It holds a SHA-256 of key, shape and data, and is computed anew where that does
    not fit. When the limit is reached folders of other models make room, that opened longest ago first; when none is
    left, or the disk is full, nothing more is stored.

    Args:
        folder: where the folders of the models are made.
        limit: bytes of all files, or None for a quarter of what is free beside them.
    """

    def __init__(self, folder: str | os.PathLike, limit: int | None = None):
        self.root, self.limit, self.bytes, self._others_bytes = Path(folder), limit, 0, 0
        self.folder: Path | None = None
        self._full = False

    def describe(self) -> str:
        """Say where tensors are kept and how many bytes of them."""
        return f"up to {(self.limit or 0) / 2**20:,.0f} MiB of files in {self.folder or self.root}"

    def open(self, identity: Callable[[], str]) -> None:
        """Use the folder of the model whose digest ``identity`` returns."""
        self.folder, self._full = self.root / identity(), False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.utime(self.folder)  # as a file that is stored would do
            self.bytes, others = _size(self.folder), self._others()
            self._others_bytes = sum(others.values())
            if self.limit is None:
                self.limit = self.bytes + self._others_bytes + shutil.disk_usage(self.folder).free // SHARE
        except OSError as error:
            self._stop(error)

    def get(self, key: bytes) -> torch.Tensor | None:
        """Return the tensor stored under ``key``, or None where there is none or its file is damaged."""
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        value = _decode(key, content)
        if value is None:
            _log.warning("%s is damaged: computed again", self._path(key))
        return value

    def put(self, key: bytes, value: torch.Tensor) -> None:
        """Store ``value`` unless the limit is reached or the disk refuses."""
        if self._full:
            return
        content = _encode(key, value)
        path = self._path(key)
        if not self._make_room(len(content)):
            self._stop(f"the limit of {self.limit:,} bytes is reached")
            return
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            aside.write_bytes(content)
            os.replace(aside, path)
        except OSError as error:
            self._stop(error)
            aside.unlink(missing_ok=True)
            return
        self.bytes += len(content)

    def _others(self) -> dict[Path, int]:
        """Return the folders of other models and their bytes, the one that was used longest ago first."""
        named = [path for path in self.root.iterdir() if path != self.folder and _NAME.fullmatch(path.name)]
        folders = [path for path in named if path.is_dir() and not path.is_symlink()]
        return {path: _size(path) for path in sorted(folders, key=lambda path: path.stat().st_mtime)}

    def _make_room(self, size: int) -> bool:
        """Delete folders of other models until ``size`` more bytes are within the limit; return whether they are."""
        if self.bytes + size > self.limit:
            return False
        if self.bytes + size + self._others_bytes > self.limit:
            try:
                others = self._others()
            except OSError:  # another process deletes one
                return False
            self._others_bytes = sum(others.values())
            for path, taken in others.items():
                if self.bytes + size + self._others_bytes <= self.limit:
                    break
                shutil.rmtree(path, ignore_errors=True)
                self._others_bytes -= taken
                _log.info("prefix cache: %s of another model made room, %s bytes", path, f"{taken:,}")
        return self.bytes + size + self._others_bytes <= self.limit

    def _path(self, key: bytes) -> Path:
        return self.folder / hashlib.sha256(key).hexdigest()

    def _stop(self, reason) -> None:
        self._full = True
        _log.warning("prefix cache in %s: nothing more is stored: %s", self.folder, reason)


def _size(folder: Path) -> int:
    """Return the bytes of the files in ``folder``, of which other processes may rename or delete any meanwhile."""
    found = 0
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            found += entry.stat().st_size if entry.is_file() else 0
    return found


def _encode(key: bytes, value: torch.Tensor) -> bytes:
    """Return ``magic, header length, header, data, SHA-256`` of a tensor."""
    header = json.dumps({"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}).encode()
    body = header + value.contiguous().view(torch.uint8).numpy().tobytes()
    return _MAGIC + len(header).to_bytes(4, "little") + body + hashlib.sha256(key + body).digest()


def _decode(key: bytes, content: bytes) -> torch.Tensor | None:
    """Return the tensor, or None if anything about the bytes is wrong."""
    length = int.from_bytes(content[8:12], "little")
    body, digest = content[12:-32], content[-32:]
    if content[:8] != _MAGIC or hashlib.sha256(key + body).digest() != digest:
        return None
    header = json.loads(body[:length])
    return torch.frombuffer(bytearray(body[length:]), dtype=_DTYPES[header["dtype"]]).view(header["shape"])
