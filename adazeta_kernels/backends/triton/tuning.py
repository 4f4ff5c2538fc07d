"""Which configuration of a kernel runs: the fastest of a short list, measured once per device and class of shapes.

Choices are kept in `$ADAZETA_CACHE` (or ~/.cache/adazeta)/triton-<version>-<device>.json. ADAZETA_AUTOTUNE=0 takes the
first of every list, as the interpreter and calls captured in a CUDA graph do. Results do not depend on the choice.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
import triton

from adazeta_kernels.backends.triton.compat import INTERPRETED
from adazeta_kernels.backends.triton.launch import Configuration, capturing

_log = logging.getLogger("adazeta_kernels")


def choose(
    key: str,
    shapes: tuple[int, ...],
    candidates: list[Configuration],
    device: torch.device,
    prepare: Callable[[], Callable[[Configuration], None]],
) -> Configuration:
    """Find the fastest of `candidates` for calls like this one.

    Args:
        key: the kernel, and whatever makes it another one, such as dtypes.
        shapes: the `launch.shape_class` of the call.
        prepare: makes a function that launches the kernel once under a configuration, on memory of its own.
    """
    if INTERPRETED or len(candidates) == 1 or os.environ.get("ADAZETA_AUTOTUNE") == "0":
        return candidates[0]
    path = _path(torch.cuda.get_device_name(device))
    chosen = _chosen(path)
    key = f"{key} {'x'.join(map(str, shapes))}"
    if chosen.get(key) not in candidates:
        if capturing(device):
            return candidates[0]
        chosen[key] = _fastest(candidates, device, prepare())
        _save(path, chosen)
    return chosen[key]


def _fastest(candidates, device, run):
    with torch.cuda.device(device):
        times = [triton.testing.do_bench(lambda c=c: run(c), warmup=5, rep=20) for c in candidates]
    return candidates[times.index(min(times))]


@cache
def _path(device_name: str) -> Path:
    folder = Path(os.environ.get("ADAZETA_CACHE") or Path.home() / ".cache" / "adazeta")
    name = "".join(c if c.isalnum() else "-" for c in device_name)
    return folder / f"triton-{triton.__version__}-{name}.json"


@cache
def _chosen(path: Path) -> dict[str, Configuration]:
    """Choices of this process, beginning with those of the file."""
    try:
        return {
            key: Configuration(tuple((name, int(value)) for name, value in entry.pop("sizes")), **entry)
            for key, entry in json.loads(path.read_text()).items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("choices of Triton configurations in %s are unusable, measuring anew: %s", path, error)
        return {}


def _save(path: Path, chosen: dict[str, Configuration]) -> None:
    text = json.dumps({key: asdict(configuration) for key, configuration in sorted(chosen.items())}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")  # renamed when whole: other processes write the same file
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        _log.warning("choices of Triton configurations cannot be kept in %s: %s", path, error)
