"""The ops as torch knows them: schema, implementation, and fake for torch.compile.

The functions that people call are in `ops.py`, with their documentation; they hand on arguments of the right types.
What else may be wrong with those is checked here, by `checks.py`, before anything is written.
"""

from __future__ import annotations

import torch
from torch.autograd.graph import increment_version

from adazeta_kernels import checks, dispatch
from adazeta_kernels.layout import TTAdapterLayout

_lib = torch.library.Library("adazeta", "DEF")
_implementations = {}


def _register(schema: str, impl, fake) -> None:
    """Register one op for all devices; a call costs a few microseconds, one of `custom_op` several times that."""
    name = schema.partition("(")[0]
    _implementations[name] = impl
    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _lib.impl(name, impl, "CompositeExplicitAutograd")
    if "(a!)" in schema:  # torch would hand over a copy of a negated view, where `checks.writable` is to refuse it
        _lib.impl(name, torch.library.fallthrough_kernel, "Negative")
    torch.library.register_fake(f"adazeta::{name}", fake, lib=_lib)


def call(name: str, *args, **permissions: bool):
    """Run an op: through torch's dispatcher where anything there would act on the call, else without that, which costs
    half of a small call and .2 us per tensor of a list. `permissions` are for the second way alone."""
    if torch.compiler.is_compiling() or not dispatch.plain(*args):
        return getattr(torch.ops.adazeta, name).default(*args)
    return _implementations[name](*args, **permissions)


def _fill_normal_(out, seed, offset, distribution, backend):
    checks.writable("fill_normal_", (out,), offset)
    checks.one_of("fill_normal_", "distribution", distribution, checks.DISTRIBUTIONS)
    checks.in_memory("fill_normal_", out=out)
    run = dispatch.select("fill_normal_", backend, out.device, out.dtype, elements=dispatch.rounded(out.numel()))
    run(out, seed % 2**64, offset, distribution)
    increment_version(out)  # as torch's own ops do: autograd then refuses a backward that needs what was there


_register(
    "fill_normal_(Tensor(a!) out, int seed, int offset, str distribution, str? backend) -> ()",
    _fill_normal_,
    lambda out, seed, offset, distribution, backend: checks.writable("fill_normal_", (out,), offset),
)


def _perturb_(params, seeds, scales, offset, decay, distribution, backend):
    params = checks.writable_list("perturb_", params, offset)
    checks.perturb_arguments(params, seeds, scales, distribution)
    checks.finite("perturb_", "decay", decay)
    checks.readable("perturb_", seeds=seeds, scales=scales)
    checks.finite_scales("perturb_", scales)
    tensors = dispatch.rounded(len(params))
    run = dispatch.select("perturb_", backend, params[0].device, params[0].dtype, tensors=tensors)
    increment_version(params)  # before they leave the cache
    run(params, seeds, scales, offset, decay, distribution)


def _perturb_fake(params, seeds, scales, offset, decay, distribution, backend):
    checks.writable("perturb_", params, offset)
    checks.perturb_arguments(params, seeds, scales, distribution)


_register(
    "perturb_(Tensor(a!)[] params, Tensor seeds, Tensor scales, int offset, float decay, str distribution, "
    "str? backend) -> ()",
    _perturb_,
    _perturb_fake,
)


def _tt_factors(theta, layout, seeds, scales, offset, adapters, distribution, backend):
    layout = TTAdapterLayout.decode(layout)
    checks.tt_factors(theta, layout, seeds, scales, offset, adapters, distribution)
    checks.readable("tt_factors", seeds=seeds, scales=scales)
    checks.finite_scales("tt_factors", scales)
    checks.in_memory("tt_factors", theta=theta)
    sizes = {"cores": layout.max_cores, "probes": dispatch.rounded(seeds.numel())}
    run = dispatch.select("tt_factors", backend, theta.device, theta.dtype, **sizes)
    args = (theta, layout, seeds, scales, offset, distribution)
    if run is dispatch.reference("tt_factors"):
        # Generating the directions is most of the work: take it from the fastest backend, the bits are the same.
        args += (dispatch.select("perturb_rows", backend, theta.device, theta.dtype),)
    factors = run(*args)
    return factors[0] if adapters is None else factors


def _perturb_rows(theta, seeds, scales, offset, distribution, backend):
    checks.finite_scales("tt_factors", scales)
    run = dispatch.select("perturb_rows", backend, theta.device, theta.dtype)
    return run(theta, seeds, scales, offset, distribution)


# Not public: what of tt_factors is no plain torch. An op, so that torch.func, torch.compile and vmap see through it
# where they differentiate the rest.
_register(
    "perturb_rows(Tensor theta, Tensor seeds, Tensor scales, int offset, str distribution, str? backend) -> Tensor",
    _perturb_rows,
    lambda theta, seeds, *_: theta.new_empty((seeds.shape[0], theta.shape[0])),
)


def _tt_factors_fake(theta, layout, seeds, scales, offset, adapters, distribution, backend):
    layout = TTAdapterLayout.decode(layout)
    checks.tt_factors(theta, layout, seeds, scales, offset, adapters, distribution)
    shape = (seeds.shape[0], layout.factor_numel)
    return theta.new_empty(shape if adapters is None else (adapters, *shape))


_register(
    "tt_factors(Tensor theta, int[] layout, Tensor seeds, Tensor scales, int offset, int? adapters, str distribution, "
    "str? backend) -> Tensor",
    _tt_factors,
    _tt_factors_fake,
)


def _tt_adapter(x, factors, layout, act, scale, backend, overwrite=False):
    layout = TTAdapterLayout.decode(layout)
    checks.tt_adapter(x, factors, layout, act, scale)
    checks.in_memory("tt_adapter", x=x, factors=factors)
    sizes = {"cores": layout.max_cores, "rank": layout.max_bond, "bottleneck": layout.bottleneck}
    sizes["tokens"] = dispatch.rounded(x.shape[:2].numel())
    run = dispatch.select("tt_adapter", backend, x.device, x.dtype, **sizes)
    if overwrite and not x.is_inference():
        increment_version(x)
    return run(x, factors, layout, act, scale, overwrite)


def _tt_adapter_fake(x, factors, layout, act, scale, backend):
    checks.tt_adapter(x, factors, TTAdapterLayout.decode(layout), act, scale)
    return x.new_empty(x.shape)


_register(
    "tt_adapter(Tensor x, Tensor factors, int[] layout, str act, float scale, str? backend) -> Tensor",
    _tt_adapter,
    _tt_adapter_fake,
)


def _tt_linear(x, L, R, bias, backend):
    checks.tt_linear(x, L, R, bias)
    checks.in_memory("tt_linear", x=x, L=L, R=R, bias=bias)
    sizes = {"rank": L.shape[2], "tokens": dispatch.rounded(x.shape[:2].numel())}
    run = dispatch.select("tt_linear", backend, x.device, x.dtype, **sizes)
    return run(x, L, R, bias)


def _tt_linear_fake(x, L, R, bias, backend):
    checks.tt_linear(x, L, R, bias)
    return x.new_empty((x.shape[0], x.shape[1], R.shape[2]))


_register(
    "tt_linear(Tensor x, Tensor L, Tensor R, Tensor? bias, str? backend) -> Tensor",
    _tt_linear,
    _tt_linear_fake,
)


def _low_rank_linear(x, base, A, B, scale, backend):
    checks.low_rank_linear(x, base, A, B)
    checks.finite("low_rank_linear", "scale", scale)
    checks.in_memory("low_rank_linear", x=x, base=base, A=A, B=B)
    sizes = {"rank": A.shape[2], "tokens": dispatch.rounded(x.shape[:2].numel())}
    run = dispatch.select("low_rank_linear", backend, x.device, x.dtype, **sizes)
    return run(x, base, A, B, scale)


def _low_rank_linear_fake(x, base, A, B, scale, backend):
    checks.low_rank_linear(x, base, A, B)
    return x.new_empty(base.shape)


_register(
    "low_rank_linear(Tensor x, Tensor base, Tensor A, Tensor B, float scale, str? backend) -> Tensor",
    _low_rank_linear,
    _low_rank_linear_fake,
)
