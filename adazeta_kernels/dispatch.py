"""Which backend runs a call, and why not another.

`backend=` of a call wins over the environment variable `ADAZETA_BACKEND`; both take auto, native, triton or reference.
A backend that is named and cannot run raises with the reason. `auto` takes the first that can and logs once why an
earlier one could not. No other backend than the reference is imported, and no GPU touched, before the first call.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache

import torch

from adazeta_kernels.backends import reference as _reference

NAMES = ("native", "triton", "reference")
ENVIRONMENT = "ADAZETA_BACKEND"

# Order in which "auto" tries backends for tensors on a GPU, per op. On the CPU it is native, then the reference.
# No GPU has timed native against Triton yet: the order is the expected one, and the same for every op and shape.
# Where a measurement (benchmarks/bench_launch.py, bench_cuda.py) says otherwise, edit the line of the op.
GPU_ORDER = {
    "fill_normal_": NAMES,
    "perturb_": NAMES,
    "perturb_rows": NAMES,
    "tt_factors": NAMES,
    "tt_adapter": NAMES,
    "tt_linear": NAMES,
    "low_rank_linear": NAMES,
}

_log = logging.getLogger("adazeta_kernels")
_choices: dict[tuple, Callable] = {}
_explaining: ContextVar[bool] = ContextVar("adazeta_explaining", default=False)


@dataclass(frozen=True)
class Explanation:
    """What a call runs.

    Attributes:
        op: name of the op.
        where: dtype and device of the tensors.
        backend: name of the backend that runs it; None where the call raises.
        passed_over: name of each backend that comes earlier -> why it is not taken.
    """

    op: str
    where: str
    backend: str | None
    passed_over: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op} for {self.where} runs on {self.backend or 'no backend'}"]
        return "\n".join(lines + [f"  not on {name}: {reason}" for name, reason in self.passed_over.items()])


class _Explained(BaseException):
    """Carries an explanation out of an op. No Exception, so that nothing on the way takes it for an error."""

    def __init__(self, explanation: Explanation):
        super().__init__(explanation)
        self.explanation = explanation


def explain(op: str | Callable, *args, **kwargs) -> Explanation:
    """Tell which backend a call would run, and why none that comes before it; nothing is run or written.

    Args:
        op: name of a public op, or the function.
        args, kwargs: those of the op, `backend` included.

    Returns:
        The explanation; `print` shows it as text.

    Raises:
        ValueError: no such op.
        TypeError, ValueError: as the op does for bad input.
    """
    from adazeta_kernels import ops

    name = op if isinstance(op, str) else op.__name__
    if name not in GPU_ORDER or not hasattr(ops, name):
        known = ", ".join(known for known in GPU_ORDER if hasattr(ops, known))
        raise ValueError(f"unknown op {name!r}; known are {known}")
    token = _explaining.set(True)
    try:
        getattr(ops, name)(*args, **kwargs)
    except _Explained as explained:
        return explained.explanation
    finally:
        _explaining.reset(token)
    raise AssertionError(f"{name} chose no backend")


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
    if _explaining.get():
        raise _Explained(_explanation(op, name, device, dtype, sizes))
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
    refused = name not in ("auto", "reference")
    # torch.compile traces this function, and knows no ContextVar.
    if not torch.compiler.is_compiling() and _explaining.get():
        no_backward = "inputs require grad, and only the reference has a backward"
        passed_over = {name: no_backward} if refused else {n: no_backward for n in NAMES[:-1] if name == "auto"}
        raise _Explained(Explanation(op, "inputs that require grad", None if refused else "reference", passed_over))
    if refused:
        raise RuntimeError(
            f"backend {name!r} cannot run {op} on inputs that require grad, only the reference has a backward: call it "
            "under torch.no_grad() or with backend='reference'"
        )
    return reference(op)


def _choose(op, name, device, dtype, sizes):
    found = _explanation(op, name, device, dtype, sizes)
    if found.backend is None:
        reasons = "; ".join(f"{n}: {reason}" for n, reason in found.passed_over.items())
        if name != "auto":
            raise RuntimeError(f"backend {name!r} cannot run {op} for {found.where}: {found.passed_over[name]}")
        raise RuntimeError(f"no backend can run {op} for {found.where} ({reasons})")
    for candidate, reason in found.passed_over.items():
        # Only a backend that is missing as a whole costs speed the user could get back.
        missing = candidate == "native" and _load(candidate)[1] is not None
        _log_once(logging.WARNING if missing else logging.INFO, candidate, None if missing else op, reason)
    return getattr(_load(found.backend)[0], op)


def _explanation(op, name, device, dtype, sizes) -> Explanation:
    """The first backend that can run the call, of those that may, and why each one before it cannot."""
    # Triton needs a GPU; its interpreter on the CPU is for tests, by name.
    automatic = GPU_ORDER[op] if device.type != "cpu" else tuple(n for n in NAMES if n != "triton")
    passed_over, where = {}, f"{dtype} on {device.type}"
    for candidate in automatic if name == "auto" else (name,):
        reason = _why_not(candidate, op, device, dtype, sizes)
        if reason is None:
            return Explanation(op, where, candidate, passed_over)
        passed_over[candidate] = reason
    return Explanation(op, where, None, passed_over)


def _why_not(name, op, device, dtype, sizes) -> str | None:
    module, reason = _load(name)
    if reason:
        return reason
    return module.supports(op, device=device.type, dtype=dtype, **sizes)


@cache
def _load(name):
    """`(module, None)` if the backend can run here, else `(None, reason)`."""
    module = importlib.import_module(f"adazeta_kernels.backends.{name}")
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
