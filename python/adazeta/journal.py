"""The journal of a run: per step the coefficients and the learning rate, from which the run can be done again.

The format is written down in docs/journal.md; ``journal_format`` reads and encodes it, ``Journal`` writes files.
"""

import errno
import fcntl
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import save_file

from .errors import JournalError, UserError
from .files import replacing
from .journal_format import Contents, check_header, check_same, encode, header_bytes, parse, parse_header
from .update import Step

NAME = "journal.azj"
INITIAL_NAME = "journal-initial.safetensors"  # of journals before files of initial numbers were named by their digest


class Journal:
    """An open journal that records steps as they are made; no second one can be opened meanwhile.

    ``append`` hands the record to the operating system before it returns: it survives the death of the process. If
    that fails (a full disk, Ctrl-C), the file is cut back to the last whole record; the error of a disk names the file.

    Args:
        path: the journal.
        file: open and locked, at its end.
        header: what the file begins with.
        next_step: index of the step to be recorded next.
        chain: checksum of everything recorded so far.
        fsync_every: steps after which the records are forced to the disk, where they survive a power failure; 0 leaves
            that to ``sync`` and ``close``.
    """

    def __init__(self, path: Path, file, header: dict, next_step: int, chain: int, fsync_every: int):
        self.path, self.header, self.next_step, self.fsync_every = path, header, next_step, fsync_every
        self._file, self._chain = file, chain

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        header: dict,
        initial: dict[str, torch.Tensor] | None = None,
        *,
        fsync_every: int = 0,
    ) -> "Journal":
        """Start a journal at ``path``, replacing an older one; ``initial`` holds numbers that no seed rebuilds.

        Raises:
            UserError: another process writes to that journal, or a file can't be written; an older journal and its
                initial numbers are then as they were.
        """
        path = Path(path)
        check_header(header, path)
        content, chain = header_bytes(header)
        with _held(path) as earlier:  # until the new file, locked before it gets the name, stands in its place
            own, file = path.with_name(_initial_name(header)), None
            try:
                with replacing(path, new=earlier is None) as temporary:
                    temporary.write_bytes(content)
                    file = _locked(temporary, path)
                    if initial:  # there before the journal that needs them
                        with replacing(own) as numbers:
                            save_file({name: t.detach().cpu().contiguous() for name, t in initial.items()}, numbers)
                if earlier is not None:
                    _remove_initial(path, earlier.readall(), own)
            except BaseException:
                if file is not None:
                    file.close()
                raise
        file.seek(len(content))
        return cls(path, file, header, 0, chain, fsync_every)

    @classmethod
    def resume(cls, path: str | os.PathLike, header: dict, *, fsync_every: int = 0) -> "tuple[Journal, list[Step]]":
        """Open the journal of an interrupted run, cut off a torn last record, and return it with its whole steps.

        Raises:
            UserError: another process writes to it, or it can't be read.
            JournalError: it is damaged, or belongs to a run with other settings, another model or another version;
                nothing has been written then.
        """
        path = Path(path)
        file = _locked(path, path)
        try:
            found = parse(path, file.readall())
            check_same(path, found.header, header)
            file.truncate(found.ends[-1])
            file.seek(found.ends[-1])
        except BaseException:
            file.close()
            raise
        return cls(path, file, found.header, len(found.steps), found.chain, fsync_every), found.steps

    def append(self, step: Step) -> None:
        """Record ``step``; raises ``UserError`` when it can't be written, and the file keeps its whole records."""
        if step.index != self.next_step:
            raise ValueError(f"expected step {self.next_step} to be recorded next, got {step.index}")
        if self._file is None:
            raise ValueError(f"the journal {self.path} is closed")
        record, chain = encode(step, self._chain)
        size = self._file.tell()
        try:
            written = self._file.write(record)
            if written != len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.fsync_every and (step.index + 1) % self.fsync_every == 0:
                os.fsync(self._file.fileno())
        except BaseException as error:  # Ctrl-C too: a loop that goes on records this step again
            self._file.truncate(size)
            self._file.seek(size)
            if not isinstance(error, OSError):
                raise
            raise UserError(f"cannot write {self.path}: {error.strerror}; free some space and resume") from error
        self.next_step, self._chain = step.index + 1, chain

    def sync(self) -> None:
        """Force what was recorded to the disk, so that a checkpoint written next is never newer than the journal."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Force the records to the disk and let others open the journal. A second call does nothing."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None


def _locked(path: Path, name: Path):
    """Open ``path`` for reading and writing, alone; ``name`` is what errors call it."""
    try:
        file = open(path, "r+b", buffering=0)
    except OSError as error:
        raise UserError(f"cannot open the journal {name}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise UserError(
            f"another process writes to {name}: wait for it or stop it, or choose another folder"
        ) from error
    if not os.path.exists(path) or os.fstat(file.fileno()).st_ino != os.stat(path).st_ino:
        file.close()  # replaced between opening and locking
        raise UserError(f"another process has just replaced {name}: choose another folder")
    return file


@contextmanager
def _held(path: Path) -> Iterator[io.FileIO | None]:
    """Hold the lock of an earlier journal at ``path``; yield its file, or None if there is none."""
    file = _locked(path, path) if path.exists() else None
    try:
        yield file
    finally:
        if file is not None:
            file.close()


def initial_path(path: Path, header: dict) -> Path:
    """Return the file of initial numbers of the journal at ``path``."""
    own, earlier = path.with_name(_initial_name(header)), path.with_name(INITIAL_NAME)
    return earlier if earlier.exists() and not own.exists() else own


def _initial_name(header: dict) -> str:
    """Name the file by its digest: until a new journal stands in its place, the earlier one needs its own numbers."""
    return f"journal-initial-{header['initial_sha256'][:16]}.safetensors"


def _remove_initial(path: Path, replaced: bytes, kept: Path) -> None:
    """Remove the initial numbers of the journal that was ``replaced`` at ``path``, if ``kept`` is another file."""
    with suppress(JournalError, OSError):  # a file too many does no harm
        header = parse_header(path, memoryview(replaced))[0]
        if header["initial"] == "file" and (unused := initial_path(path, header)) != kept:
            unused.unlink(missing_ok=True)


def read(path: str | os.PathLike, repair: bool = False) -> Contents:
    """Return header and steps of the journal at ``path``.

    Args:
        path: the file; nothing is written to it.
        repair: leave a torn last record out instead of refusing it.

    Raises:
        UserError: no such file.
        JournalError: not a journal, of another version, a damaged header or record, or a torn last record (unless
            ``repair``); its ``offset`` is where the damage begins.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the journal {path}: {error.strerror}") from error
    found = parse(path, content)
    if found.torn and not repair:
        raise JournalError(
            f"{path} is cut off at byte {found.ends[-1]}, inside the record after step {len(found.steps) - 1}; "
            "`adazeta train --resume` goes on from there",
            offset=found.ends[-1],
        )
    return found


def steps(path: str | os.PathLike) -> Iterator[Step]:
    """Yield the recorded steps of a journal."""
    yield from read(path).steps
