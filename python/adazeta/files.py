"""Files that are either the old one or the new one, never half of one."""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import UserError

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space and {again}",
    errno.EDQUOT: "the disk quota is used up: free some space and {again}",
    errno.EFBIG: "the largest file that the system allows is reached (ulimit -f): raise it and {again}",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "no permission to write there: choose another folder",
    errno.EPERM: "no permission to write there: choose another folder",
    errno.ENOTDIR: "part of the path is a file, not a folder: choose another folder",
    errno.ENAMETOOLONG: "the path is too long: choose another folder",
    errno.EEXIST: "a file of that name is in the way: choose another folder",
}

_FULL = ("No space left", "PytorchStreamWriter failed", "file write failed", "iostream error", "unexpected pos ")


@contextmanager
def replacing(path: str | os.PathLike, *, new: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it over ``path`` when the block ends well, else remove it.

    Args:
        path: the file to write.
        new: it is not there yet, and the first of several processes that make it wins.

    Raises:
        UserError: the file can't be written (a full disk, no permission, another was first); ``path`` is then as it
            was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # of a process of that id that was killed: it may be a second name of path
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        _name_first(temporary, path) if new else os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; the earlier file is unchanged") from error
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            temporary.unlink()


def _name_first(temporary: Path, path: Path) -> None:
    """Give a file the name ``path``, unless there is one of that name by now."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise UserError(f"another process has just begun {path}: choose another folder") from error
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        os.rename(temporary, path)  # a file system without links: who comes first is not known there


def _sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk: until then a power failure may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turn what the disk refuses (full, read-only, not permitted) into a one-line UserError naming ``path``.

    What is in the folder of an unfinished run, ``<output>.partial``, stays: the line says how to go on.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        # torch and safetensors write through their own code and tell a full disk in words only.
        if any(sign in str(error) for sign in _FULL):
            number = errno.ENOSPC
        if number == errno.ENOENT and str(path) == str(error.filename):  # of /proc and the like
            number = errno.EACCES
        if isinstance(error, UserError) or number not in _ADVICE:
            raise
        again = "go on with --resume" if Path(path).suffix == ".partial" else "run the command again"
        raise UserError(f"cannot write {path}: {_ADVICE[number].format(again=again)}") from error


@contextmanager
def replacing_folder(path: str | os.PathLike, *, overwrite: bool, ours: Sequence[str]) -> Iterator[Path]:
    """Yield a new folder beside ``path``; when the block ends well it takes the place of ``path``, else it is removed.

    Args:
        path: the folder to write.
        overwrite: it may replace a folder that is not empty, if that holds one of the files ``ours``.

    Raises:
        UserError: ``path`` is in the way, or cannot be written; it is then as it was.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: choose another folder")
    if path.is_dir() and any(path.iterdir()):
        if (path / "adazeta.json").is_file() or not any((path / name).is_file() for name in ours):
            raise UserError(f"{path} is not empty and not an earlier export: choose another folder")
        if not overwrite:
            raise UserError(f"{path} exists already: add --overwrite, or choose another folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path):
            temporary.mkdir(parents=True)
            yield temporary
            put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


#: In a folder that another one has replaced or is about to: what is left of it is nobody's.
REPLACED = ".replaced"


def put_in_place(folder: Path, path: Path) -> None:
    """Rename ``folder``, forced to the disk, to ``path``; an earlier folder there goes only then.

    Where the system can exchange two names, there is a whole folder at ``path`` at every instant, whenever the process
    dies. Elsewhere an earlier one has another name for a moment; :func:`put_back` finds it.
    """
    sync_tree(folder)
    old = _aside(path)
    if path.exists():
        (path / REPLACED).touch()
        if not _exchanged(folder, path):
            os.rename(path, old)
            try:
                os.rename(folder, path)
            except OSError:
                os.rename(old, path)
                (path / REPLACED).unlink()
                raise
        else:
            os.rename(folder, old)
    else:
        os.rename(folder, path)
    _sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def put_back(path: Path) -> None:
    """Clear up after a process that died in :func:`put_in_place`: the earlier folder comes back if nothing is there."""
    for old in sorted(path.parent.glob(_aside(path, "*").name)):
        if _lives(old.name.rpartition("-")[2]):
            continue
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, path)
            (path / REPLACED).unlink(missing_ok=True)


def _lives(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _aside(path: Path, process: int | str | None = None) -> Path:
    return path.with_name(f".{path.name}.old-{process or os.getpid()}")


def _exchanged(one: Path, other: Path) -> bool:
    """Let two folders exchange their names, in one instant; False where the system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call is None:
        return False
    if call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def sync_tree(folder: Path) -> None:
    """Force a folder, the files in it and those of the folders in it to the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(file := os.path.join(place, name)):
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        _sync_folder(Path(place))
    _sync_folder(folder.parent)  # which has its name


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, aside then renamed.

    Raises:
        UserError: the file can't be written; an earlier file at ``path`` is as it was.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(path: str | os.PathLike) -> Path:
    """Make the folder ``path`` (and those above it); raises ``UserError`` where that can't be done."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from error
    return path
