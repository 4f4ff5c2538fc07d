"""Peak resident memory of a stretch of code, measured inside the process."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20


_UNITS = {"": 1, "B": 1, **{f"{p}{b}": n**i for i, p in enumerate("KMGT", 1) for b, n in (("B", 1000), ("iB", 1024))}}


def read_size(value: int | str) -> int:
    """Return the number of bytes that ``500MB``, ``2GiB`` or a plain number says.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)", str(value).strip())
    if not match or match[2] not in _UNITS:
        raise ValueError(f"expected a size such as 500MB or 2GiB, got {value!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def resident_bytes() -> int | None:
    """Return the resident set of this process in bytes, or None where the system does not tell (not Linux)."""
    _trim()
    return _status("VmRSS:")


class Peak:
    """Measure the peak resident set while the block runs; ``bytes`` afterwards.

    Linux: the high-water mark is reset through ``/proc/self/clear_refs`` when the block starts. Where that is not
    permitted the mark of the whole process is reported and ``exact`` is False: it can only be too high.
    """

    bytes: int = 0
    exact: bool = False

    def __enter__(self):
        _trim()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.exact = True
        except OSError:
            self.exact = False
        return self

    def __exit__(self, *_) -> None:
        self.exact = self.exact and _status("VmHWM:") is not None
        self.bytes = peak_bytes()


def peak_bytes() -> int:
    """Return the high-water mark of this process's resident set, since its start or since it was reset."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def available_bytes() -> int:
    """Return the memory that this process can take without swapping, its control group's limit included.

    Where the system does not tell (not Linux), half of the physical memory. Processes that torchrun started side by
    side share it evenly.
    """
    found = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        kinds = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        cache = sum(int(kinds.get(name, 0)) for name in ("active_file", "inactive_file"))  # given up when asked for
        found.append(max(0, limit - used + cache))
    except (OSError, ValueError):  # no control group, or one without a limit ("max")
        pass
    return min(found) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let glibc's allocator keep what is freed, inside the ``with`` statement; it is given back at the end.

    Otherwise the memory of every activation goes back to the system when it is freed, and comes again page by page: 18
    faults a token in OPT-125M. Other allocators are left alone. Inside another one it changes nothing.
    """
    global _kept
    if _kept:
        yield
        return
    _kept = True
    _mallopt(_M_MMAP_MAX, 0)  # a threshold would end at 32 MiB
    _mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:  # what they are at the start of a process
        _kept = False
        _mallopt(_M_TRIM_THRESHOLD, 128 << 10)
        _mallopt(_M_MMAP_THRESHOLD, 128 << 10)
        _mallopt(_M_MMAP_MAX, 65536)
        _trim()


def bound_prepared_products() -> None:
    """Let torch keep 128 products that oneDNN has prepared for shapes, where the environment names no other number.

    Each takes half a MiB, and half a millisecond to make again; a step has some 30, and texts of other lengths need
    others. With the 1,024 that are kept otherwise a run of a model of 135M parameters took 190 MiB more after 90 steps,
    and more with each new length. To be called before the first product, which reads the environment.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's, and torch's own before it
        os.environ.setdefault(cache, "128")


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_kept = False  # by a `freed_memory_kept` around


def _mallopt(parameter: int, value: int) -> None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        libc.mallopt(parameter, value)


def _trim() -> None:
    # Freed memory that the allocator still holds would otherwise count for whoever runs next.
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
