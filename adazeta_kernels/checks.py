"""What every op accepts, written once. Checks that read shapes and dtypes only also serve the fakes; checks that read
values run before a backend is called, so nothing is written on bad input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from operator import attrgetter, index

import torch

from adazeta_kernels.derivatives import carries_tangent
from adazeta_kernels.dispatch import ReadTensors, of_known_classes
from adazeta_kernels.layout import TTAdapterLayout

ACTS = ("relu", "gelu", "silu", "tanh", "identity")
DISTRIBUTIONS = ("gaussian", "rademacher")
INDEX_END = 2**63
_FLOAT32_END = 2.0**128 - 2.0**103  # from here on numbers round to infinity
_LOW_ADDRESSES = 2**40  # that of a freed tensor, which is its offset in nothing, is lower

_RANDOM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MATMUL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_tensor(op: str, name: str, value) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


def are_tensors(op: str, name: str, values: list) -> None:
    if not of_known_classes(values):
        for position, value in enumerate(values):
            is_tensor(op, f"{name}[{position}]", value)


def is_layout(op: str, value) -> None:
    if not isinstance(value, TTAdapterLayout):
        raise TypeError(f"{op}: layout must be a TTAdapterLayout, got {type(value).__name__}")


def are_names(op: str, backend, **names) -> None:
    """Check what the dispatcher would refuse in its own words."""
    for name, value in names.items():
        if not isinstance(value, str):
            raise TypeError(f"{op}: {name} must be a string, got {value!r}")
    if not (backend is None or isinstance(backend, str)):
        raise TypeError(f"{op}: backend must be a string or None, got {backend!r}")


def one_of(op: str, name: str, value, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{op}: unknown {name} {value!r}; known are {', '.join(known)}")


def finite(op: str, name: str, value) -> float:
    """A finite Python float."""
    number = isinstance(value, (int, float)) or (hasattr(value, "__float__") and not isinstance(value, torch.Tensor))
    if not number or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number, got {value!r} of type {type(value).__name__}")
    # While torch.compile traces, a number may be symbolic; the op then checks its value when it runs.
    if not torch.compiler.is_compiling():
        if not abs(number := value if isinstance(value, int) else float(value)) < _FLOAT32_END:  # NaN compares as False
            where = " in float32" if abs(number) < math.inf else ""
            raise ValueError(f"{op}: {name} must be finite{where}, got {value!r}")
    return float(value)


def seed(op: str, value) -> int:
    """A seed as the signed 64-bit integer with the same bits, which is what schemas and int64 tensors hold."""
    value = _integer(op, "seed", value)
    if not 0 <= value < 2**64:
        raise ValueError(f"{op}: a seed must be in 0 <= seed < 2**64, got {value}")
    return value - 2**64 if value >= INDEX_END else value


def offset(op: str, value) -> int:
    value = _integer(op, "offset", value)
    if not 0 <= value < INDEX_END:
        raise ValueError(f"{op}: offset must be in 0 <= offset < 2**63, got {value}")
    return value


def adapters(op: str, value) -> int | None:
    """How many adapters of one layout; None is one without a dimension of its own."""
    if value is None:
        return None
    value = _integer(op, "adapters", value)
    if not 1 <= value < INDEX_END:
        raise ValueError(f"{op}: adapters must be at least 1 and below 2**63, got {value}")
    return value


def _integer(op, name, value):
    integer = isinstance(value, int) or (hasattr(value, "__index__") and not isinstance(value, torch.Tensor))
    if not integer or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r} of type {type(value).__name__}")
    return index(value)


def seeds_to_tensor(op: str, seeds) -> torch.Tensor:
    """A list of seeds as an int64 tensor (two's complement); a tensor passes through."""
    if isinstance(seeds, torch.Tensor):
        return seeds
    if isinstance(seeds, (str, bytes)) or not isinstance(seeds, Sequence):
        raise TypeError(f"{op}: seeds must be a list of integers or an int64 tensor, got {type(seeds).__name__}")
    return torch.tensor([seed(op, value) for value in seeds], dtype=torch.int64, device="cpu")


def scales_to_tensor(op: str, scales) -> torch.Tensor:
    """A list of scales as a float32 tensor; a tensor passes through, with its own sign where it is a negated view."""
    if isinstance(scales, torch.Tensor):
        return scales.resolve_neg()
    if isinstance(scales, (str, bytes)) or not isinstance(scales, Sequence):
        raise TypeError(f"{op}: scales must be a list of numbers or a float32 tensor, got {type(scales).__name__}")
    return torch.tensor([finite(op, "a scale", value) for value in scales], dtype=torch.float32, device="cpu")


def seeds_and_scales(op: str, seeds: torch.Tensor, scales: torch.Tensor, *, of: torch.Tensor, empty_ok: bool) -> None:
    """Metadata of seeds and scales. They may be without memory where the tensor they are of is, too."""
    for name, tensor, dtype in (("seeds", seeds, torch.int64), ("scales", scales, torch.float32)):
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {_name(dtype)}, got {_name(tensor.dtype)}")
        if tensor.dim() != 1:
            raise ValueError(f"{op}: {name} must have one dimension, got shape {tuple(tensor.shape)}")
        if tensor.device.type != "cpu" and not tensor.device.type == of.device.type == "meta":
            raise ValueError(f"{op}: {name} must be on the CPU, got {tensor.device}")
    if len(seeds) != len(scales):
        raise ValueError(f"{op}: {len(seeds)} seeds but {len(scales)} scales, expected one scale per seed")
    if len(seeds) == 0 and not empty_ok:
        raise ValueError(f"{op}: no seeds given, expected at least one probe (scale 0 evaluates theta itself)")


def finite_scales(op: str, scales: torch.Tensor) -> None:
    """Values of scales."""
    for position, value in enumerate(scales.tolist()):
        if not math.isfinite(value):
            raise ValueError(f"{op}: scales must be finite in float32, got {value} at position {position}")


def writable_list(op: str, params: list[torch.Tensor], start: int) -> ReadTensors:
    """The tensors, all of which can be written and share no memory. C++ looks where it can, in a tenth of the time."""
    params = read(params)
    if params.native is None:
        writable(op, params, start)
        no_overlap(op, params)
    else:
        index_end(op, start, params.native.numel)
    return params


def read(params: list[torch.Tensor]) -> ReadTensors:
    """`native.read_tensors` of a list that may have been read before."""
    from adazeta_kernels.backends import native  # not at import, which stays free of the extension

    return params if isinstance(params, ReadTensors) else native.read_tensors(params)


def index_end(op: str, start: int, numel: int) -> None:
    if start + numel > INDEX_END:
        raise ValueError(f"{op}: offset {start} plus {numel} elements reaches beyond index 2**63")


def writable(op: str, params: Sequence[torch.Tensor], start: int) -> None:
    """Tensors that are written in place: dtype, layout, one device, indices below 2**63."""
    total = 0
    for position, param in enumerate(params):
        name = f"tensor {position} of shape {tuple(param.shape)}"
        if param.dtype not in _RANDOM_DTYPES:
            raise TypeError(f"{op}: {name} has dtype {_name(param.dtype)}, expected {_names(_RANDOM_DTYPES)}")
        if param.layout != torch.strided or not param.is_contiguous():
            raise ValueError(
                f"{op}: {name} is not contiguous (stride {param.stride() if param.layout == torch.strided else None}, "
                f"{param.layout}), expected contiguous: work on .contiguous() and copy the result back"
            )
        if param.is_neg():
            raise ValueError(
                f"{op}: {name} is a negated view (torch.Tensor.is_neg), expected a tensor of its own: work on "
                ".resolve_neg() and copy the result back"
            )
        if param.device != params[0].device:
            raise ValueError(f"{op}: {name} is on {param.device}, expected {params[0].device} as the first one")
        total += param.numel()
    index_end(op, start, total)


def no_leaf_in_grad_mode(op: str, params: Sequence[torch.Tensor]) -> None:
    if torch.is_grad_enabled() and any(map(attrgetter("requires_grad"), params)):
        for position, param in enumerate(params):
            if param.requires_grad:
                raise ValueError(
                    f"{op}: tensor {position} of shape {tuple(param.shape)} requires grad and is written in place: "
                    "call it under torch.no_grad()"
                )
    if carries_tangent(*params):
        raise ValueError(f"{op}: a tensor carries a tangent, and what is written in place has none: detach it first")


def in_memory(op: str, **tensors: torch.Tensor | None) -> None:
    """Storage of tensors: `untyped_storage().resize_(0)` frees it (sharded training does) and leaves the shape."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel() and not tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{op}: the memory of {name} of shape {tuple(tensor.shape)} was freed, expected a live tensor"
            )


def readable(op: str, **tensors: torch.Tensor) -> None:
    """`in_memory` of small tensors, for a tenth of its time."""
    for name, tensor in tensors.items():
        if tensor.data_ptr() < _LOW_ADDRESSES:
            in_memory(op, **{name: tensor})


def no_overlap(op: str, params: Sequence[torch.Tensor]) -> None:
    """Memory of contiguous tensors: there, and no byte twice."""
    spans = sorted((p.data_ptr(), p.numel() * p.element_size(), i) for i, p in enumerate(params) if p.numel())
    for start, _, position in spans:
        if start >= _LOW_ADDRESSES:
            break
        in_memory(op, **{f"tensor {position}": params[position]})
    for (start, size, first), (following, _, second) in pairwise(spans):
        if start + size > following:
            raise ValueError(
                f"{op}: tensors {min(first, second)} and {max(first, second)} share memory, expected distinct tensors: "
                "pass a tied weight once"
            )


def perturb_arguments(
    params: Sequence[torch.Tensor], seeds: torch.Tensor, scales: torch.Tensor, distribution: str
) -> None:
    seeds_and_scales("perturb_", seeds, scales, of=params[0], empty_ok=True)
    one_of("perturb_", "distribution", distribution, DISTRIBUTIONS)


def tt_factors(theta: torch.Tensor, layout: TTAdapterLayout, seeds, scales, start: int, count, distribution) -> None:
    count = adapters("tt_factors", count)
    if theta.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"tt_factors: theta must be float32 or float64, got {_name(theta.dtype)}")
    _dense("tt_factors", "theta", theta)
    numel = layout.numel * (count or 1)
    if theta.dim() != 1 or theta.shape[0] != numel:
        of = "" if count is None else f" for {count} adapters"
        raise ValueError(f"tt_factors: theta must have shape ({numel},){of}, got {tuple(theta.shape)}")
    index_end("tt_factors", start, numel)
    seeds_and_scales("tt_factors", seeds, scales, of=theta, empty_ok=False)
    one_of("tt_factors", "distribution", distribution, DISTRIBUTIONS)


def tt_adapter(x: torch.Tensor, factors: torch.Tensor, layout: TTAdapterLayout, act: str, scale: float) -> None:
    _tokens("tt_adapter", "x", x)
    if x.shape[2] != layout.width:
        raise ValueError(f"tt_adapter: x has width {x.shape[2]}, expected {layout.width} of the layout")
    _per_probe("tt_adapter", x, factors=(factors, (x.shape[0], layout.factor_numel), "(P, F)"))
    one_of("tt_adapter", "act", act, ACTS)
    finite("tt_adapter", "scale", scale)


def tt_linear(x: torch.Tensor, L: torch.Tensor, R: torch.Tensor, bias: torch.Tensor | None) -> None:
    _tokens("tt_linear", "x", x)
    probes, _, d_in = x.shape
    rank, d_out = _factor_dims("tt_linear", L=L, R=R)
    expected = {"L": (L, (probes, d_in, rank), "(P, d_in, r)"), "R": (R, (probes, rank, d_out), "(P, r, d_out)")}
    if bias is not None:
        expected["bias"] = (bias, (probes, d_out), "(P, d_out)")
    _per_probe("tt_linear", x, **expected)


def low_rank_linear(x: torch.Tensor, base: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> None:
    _tokens("low_rank_linear", "x", x)
    _tokens("low_rank_linear", "base", base)
    probes, tokens, d_in = x.shape
    rank, d_out = _factor_dims("low_rank_linear", A=A, B=B)
    if base.dtype != x.dtype:
        raise TypeError(f"low_rank_linear: base is {_name(base.dtype)}, expected {_name(x.dtype)} as x")
    if base.device != x.device:
        raise ValueError(f"low_rank_linear: base is on {base.device}, expected {x.device} as x")
    if tuple(base.shape) != (probes, tokens, d_out):
        raise ValueError(
            f"low_rank_linear: base has shape {tuple(base.shape)}, expected (P, T, d_out) = {(probes, tokens, d_out)}"
        )
    _per_probe(
        "low_rank_linear",
        x,
        A=(A, (probes, d_in, rank), "(P, d_in, r)"),
        B=(B, (probes, rank, d_out), "(P, r, d_out)"),
    )


def _tokens(op, name, x):
    if x.dtype not in _MATMUL_DTYPES:
        raise TypeError(f"{op}: {name} has dtype {_name(x.dtype)}, expected {_names(_MATMUL_DTYPES)}")
    _dense(op, name, x)
    if x.dim() != 3:
        raise ValueError(f"{op}: {name} must have shape (P, T, d), probes first, got {tuple(x.shape)}")
    if x.shape[0] < 1:
        raise ValueError(f"{op}: {name} has no probes, expected at least one, got shape {tuple(x.shape)}")


def _dense(op, name, tensor):
    if tensor.layout != torch.strided:
        raise ValueError(f"{op}: {name} of shape {tuple(tensor.shape)} is {tensor.layout}, expected torch.strided")


def _factor_dims(op, **pair):
    (left_name, left), (right_name, right) = pair.items()
    for name, tensor in pair.items():
        if tensor.dim() != 3:
            raise ValueError(f"{op}: {name} must have three dimensions, probes first, got {tuple(tensor.shape)}")
    if left.shape[2] != right.shape[1]:
        raise ValueError(
            f"{op}: rank {left.shape[2]} of {left_name} {tuple(left.shape)} and rank {right.shape[1]} of "
            f"{right_name} {tuple(right.shape)} differ"
        )
    return left.shape[2], right.shape[2]


def _per_probe(op, x, **expected):
    for name, (tensor, shape, words) in expected.items():
        allowed = (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,)
        if tensor.dtype not in allowed:
            raise TypeError(
                f"{op}: {name} is {_name(tensor.dtype)}, expected {_names(allowed)} for x of {_name(x.dtype)}: factors "
                "are never rounded, or a small perturbation is lost"
            )
        _dense(op, name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {x.device} as x")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {words} = {shape}")


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _names(dtypes):
    return " or ".join(_name(dtype) for dtype in dtypes)
