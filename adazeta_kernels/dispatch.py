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

UNMEASURED = "the expected order, no GPU has timed native against Triton yet"


@dataclass(frozen=True)
class Order:
    """The order in which backends are tried for a class of shapes.

    Attributes:
        shapes: the class, in words.
        most: size -> the most of it that belongs to the class; {} is no bound. Sizes are those that
            registration.py hands to `select`; a bound on one that `rounded` makes is a power of two.
        names: backends, the one to try first in front.
        reason: the measurement behind the order.
    """

    shapes: str = "any shape"
    most: dict[str, int] = field(default_factory=dict)
    names: tuple[str, ...] = NAMES
    reason: str = UNMEASURED


# What "auto" tries for tensors on a GPU: of an op's lines the first whose bounds hold, so the last one has none.
# Where a measurement (benchmarks/bench_launch.py, bench_cuda.py) says otherwise, put a line in front, such as
#     Order("few tokens", {"tokens": 64}, ("triton", "native", "reference"), "H100: 1.2 times native's speed"),
GPU_ORDER: dict[str, tuple[Order, ...]] = {
    "fill_normal_": (Order(),),
    "perturb_": (Order(),),
    "perturb_rows": (Order(),),
    "tt_factors": (Order(),),
    "tt_adapter": (Order(),),
    "tt_linear": (Order(),),
    "low_rank_linear": (Order(),),
}
CPU_ORDER = Order(names=("native", "reference"), reason="Triton's interpreter is for tests, and runs by name only")

# How many modes and transforms listen to ops. torch has no public way to ask; where these are gone, every call goes
# through its dispatcher.
try:
    _DEPTHS = (
        torch._C._len_torch_dispatch_stack,
        torch._C._functorch.get_dynamic_layer_stack_depth,
        torch._C._autograd._profiler_enabled,
    )
except AttributeError:
    _DEPTHS = None
_CLASSES = {torch.Tensor, torch.nn.Parameter}

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
        order: what was tried, for which shapes and why.
    """

    op: str
    where: str
    backend: str | None
    passed_over: dict[str, str]
    order: Order

    def __str__(self) -> str:
        lines = [f"{self.op} for {self.where} runs on {self.backend or 'no backend'}"]
        lines += [f"  not on {name}: {reason}" for name, reason in self.passed_over.items()]
        return "\n".join([*lines, f"  {self.order.shapes}: {', '.join(self.order.names)} ({self.order.reason})"])


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

    name = op if isinstance(op, str) else getattr(op, "__name__", op)
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
    """Find the function that runs `op` for these arguments.

    Args:
        sizes: what a backend may limit (cores, rank, bottleneck), and what GPU_ORDER may tell shapes by.

    Raises:
        ValueError: an unknown backend name.
        RuntimeError: a named backend cannot run the call; the message gives the reason.
    """
    name = requested(backend)
    if _explaining.get():
        raise _Explained(_explanation(op, name, device, dtype, sizes))
    key = (op, name, device, dtype, *sizes.values())
    if key not in _choices:
        _choices[key] = _choose(op, name, device, dtype, sizes)
    return _choices[key]


def rounded(size: int) -> int:
    """The next power of two: few values, for sizes that only tell classes of shapes apart."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


def reference(op: str) -> Callable:
    """The reference function of `op`, which is differentiable."""
    return getattr(_reference, op)


class ReadTensors(list):
    """Tensors that C++ has looked at, once for the checks and the kernel.

    `native` is the list as C++ holds it: all are fit to be written in place, which is float32, bfloat16 or float16,
    contiguous, on one device, none sharing memory. None where they are not, or where C++ cannot tell.
    """

    def __init__(self, params: list[torch.Tensor], native):
        super().__init__(params)
        self.native = native


def of_known_classes(values: list) -> bool:
    """Whether each value is a tensor or a parameter, and of no class of its own. C++ has asked that of plain ones."""
    return getattr(values, "native", None) is not None or set(map(type, values)) <= _CLASSES


def plain(tensors, *args) -> bool:
    """Whether torch's dispatcher would do no more with a call than to pass it on.

    It would where a tensor is of a class of its own, meta, or a negated view (which `writable_list` refuses in lists);
    where a mode or a transform (fake tensors, vmap, tracing) listens; and where a profiler names what it sees.

    Args:
        tensors: the first argument, a tensor or a list of them on one device.
        args: the others.
    """
    if _DEPTHS is None or any(depth() for depth in _DEPTHS) or torch.jit.is_tracing():
        return False
    if isinstance(tensors, list):
        return of_known_classes(tensors) and not tensors[0].is_meta
    among = [tensors, *(arg for arg in args if isinstance(arg, torch.Tensor))]
    return of_known_classes(among) and not any(t.is_meta or t.is_neg() for t in among)


def differentiable(op: str, backend: str | None) -> Callable:
    """The reference function of `op`, for calls of which derivatives are wanted.

    Raises:
        RuntimeError: another backend is named, which has no backward.
    """
    name = requested(backend)
    refused = name not in ("auto", "reference")
    # torch.compile traces this function, and knows no ContextVar.
    if not torch.compiler.is_compiling() and _explaining.get():
        no_backward = "inputs require grad or forward mode is on, and only the reference has derivatives"
        order = Order(names=NAMES if name == "auto" else (name,), reason="derivatives are wanted")
        passed_over = {n: no_backward for n in order.names if n != "reference"}
        backend = None if refused else "reference"
        raise _Explained(Explanation(op, "inputs that require grad, or in forward mode,", backend, passed_over, order))
    if refused:
        raise RuntimeError(
            f"backend {name!r} cannot run {op} on inputs that require grad or in forward-mode differentiation: only "
            "the reference has derivatives. Call it under torch.no_grad() and outside of forward mode, or with "
            "backend='reference'"
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
    order, passed_over, where = _order(op, name, device, sizes), {}, f"{dtype} on {device.type}"
    for candidate in order.names:
        reason = _why_not(candidate, op, device, dtype, sizes)
        if reason is None:
            return Explanation(op, where, candidate, passed_over, order)
        passed_over[candidate] = reason
    return Explanation(op, where, None, passed_over, order)


def _order(op, name, device, sizes) -> Order:
    if name != "auto":
        return Order(names=(name,), reason="named by the call or the environment")
    if device.type == "cpu":
        return CPU_ORDER
    return next(o for o in GPU_ORDER[op] if all(sizes[size] <= most for size, most in o.most.items()))


def _why_not(name, op, device, dtype, sizes) -> str | None:
    module, reason = _load(name)
    if reason:
        return reason
    return module.supports(op, device=device.type, index=device.index, dtype=dtype, **sizes)


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
