"""Which backend runs a call, and why not another.

`backend=` of a call wins over the environment variable `ADAZETA_BACKEND`; both take auto, native, triton or reference.
A backend that is named and cannot run raises with the reason. `auto` takes the first that can and logs once why an
earlier one could not. No other backend than the reference is imported, and no GPU touched, before the first call.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from functools import cache

import torch

from adazeta_kernels.backends import reference as _reference

NAMES = ("native", "triton", "reference")
ENVIRONMENT = "ADAZETA_BACKEND"

_PACKAGE = "adazeta_kernels.backends"
_log = logging.getLogger("adazeta_kernels")
_choices: dict[tuple, Callable] = {}


def report() -> dict[str, str | None]:
    """Name of every known backend -> None if it can run here, else the reason why not."""
    return {name: _load(name)[1] for name in NAMES}


def requested(backend: str | None) -> str:
    """The name asked for by the call, else by the environment, else "auto".

    Raises:
        ValueError: the name is unknown.
    """
    source, name = ("backend", backend) if backend is not None else (ENVIRONMENT, os.environ.get(ENVIRONMENT) or "auto")
    if name not in NAMES and name != "auto":
        raise ValueError(f"unknown {source} {name!r}; known are auto, {', '.join(NAMES)}")
    return name


def select(op: str, backend: str | None, device: torch.device, dtype: torch.dtype, **sizes: int) -> Callable:
    """Find the function that runs `op` for these arguments; `sizes` are those that a backend may limit.

    Raises:
        ValueError: an unknown backend name.
        RuntimeError: a named backend cannot run the call; the message gives the reason.
    """
    name = requested(backend)
    key = (op, name, device.type, dtype, *sizes.values())
    if key not in _choices:
        _choices[key] = _choose(op, name, device, dtype, sizes)
    return _choices[key]


def reference(op: str) -> Callable:
    """The reference function of `op`, which is differentiable."""
    return getattr(_reference, op)


def any_requires_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a call would have to be recorded for autograd."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def differentiable(op: str, backend: str | None) -> Callable:
    """The reference function of `op`, for inputs that require grad.

    Raises:
        RuntimeError: another backend is named, which has no backward.
    """
    name = requested(backend)
    if name not in ("auto", "reference"):
        raise RuntimeError(
            f"backend {name!r} cannot run {op} on inputs that require grad, only the reference has a backward: call it "
            "under torch.no_grad() or with backend='reference'"
        )
    return reference(op)


def _choose(op, name, device, dtype, sizes):
    if name != "auto":
        reason = _why_not(name, op, device, dtype, sizes)
        if reason:
            raise RuntimeError(f"backend {name!r} cannot run {op} for {dtype} on {device.type}: {reason}")
        return getattr(_load(name)[0], op)
    # Triton needs a GPU (its interpreter on the CPU is for tests, by name).
    for candidate in (n for n in NAMES if n != "triton" or device.type != "cpu"):
        reason = _why_not(candidate, op, device, dtype, sizes)
        if reason is None:
            return getattr(_load(candidate)[0], op)
        # Only a backend that is missing as a whole costs speed the user could get back.
        missing = candidate == "native" and _load(candidate)[1] is not None
        _log_once(logging.WARNING if missing else logging.INFO, candidate, None if missing else op, reason)
    raise RuntimeError(f"no backend can run {op} for {dtype} on {device.type}")


def _why_not(name, op, device, dtype, sizes) -> str | None:
    module, reason = _load(name)
    if reason:
        return reason
    return module.supports(op, device=device.type, dtype=dtype, **sizes)


@cache
def _load(name):
    """`(module, None)` if the backend can run here, else `(None, reason)`."""
    path = f"{_PACKAGE}.{name}"
    if importlib.util.find_spec(path) is None:
        return None, f"this version of adazeta_kernels has no {name} kernels"
    module = importlib.import_module(path)
    reason = module.unavailable()
    return (None, reason) if reason else (module, None)


@cache
def _log_once(level, name, op, reason):
    _log.log(level, "backend %s cannot run%s: %s; trying the next one", name, f" {op}" if op else "", reason)


def clear() -> None:
    """Forget cached choices and logged reasons (for tests)."""
    _choices.clear()
    _load.cache_clear()
    _log_once.cache_clear()
