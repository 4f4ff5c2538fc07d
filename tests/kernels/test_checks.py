"""Bad input: every case names what was got and what was expected, and nothing is written."""

import math

import numpy as np
import pytest
import torch

import adazeta_kernels as kernels
from adazeta_kernels import TTAdapterLayout

LAYOUT = TTAdapterLayout.auto(24, 8, 2)
NAN, INF = math.nan, math.inf
TO_INF = math.nextafter(2.0**128, 0.0)  # finite, but nearer to infinity than to the largest float32


def on_meta(t):
    return t.to("meta")


def fill(out=None, seed=1, **kwargs):
    return lambda t: kernels.fill_normal_(t if out is None else out(t), seed, **kwargs)


def perturb(params=None, seeds=(1,), scales=(1.0,), **kwargs):
    return lambda t: kernels.perturb_([t] if params is None else params(t), seeds, scales, **kwargs)


IN_PLACE = {
    "fill seed -1": (fill(seed=-1), ValueError, r"seed must be in 0 <= seed < 2\*\*64, got -1"),
    "fill seed 2**64": (fill(seed=2**64), ValueError, r"0 <= seed < 2\*\*64, got 18446744073709551616"),
    "fill seed float": (fill(seed=1.0), TypeError, r"seed must be an integer, got 1.0 of type float"),
    "fill seed bool": (fill(seed=True), TypeError, r"seed must be an integer, got True of type bool"),
    "fill seed tensor": (fill(seed=torch.tensor(3)), TypeError, r"seed must be an integer, got tensor"),
    "fill offset -1": (fill(offset=-1), ValueError, r"offset must be in 0 <= offset < 2\*\*63, got -1"),
    "fill offset 2**63": (fill(offset=2**63), ValueError, r"0 <= offset < 2\*\*63, got 9223372036854775808"),
    "fill offset end": (fill(offset=2**63 - 3), ValueError, r"plus 4 elements reaches beyond index 2\*\*63"),
    "fill distribution": (fill(distribution="normal"), ValueError, r"'normal'; known are gaussian, rademacher"),
    "fill backend": (fill(backend="cuda"), ValueError, r"'cuda'; known are auto, native, triton, reference"),
    "fill numpy": (fill(lambda t: t.numpy()), TypeError, r"out must be a torch.Tensor, got ndarray"),
    "fill integer": (fill(lambda t: t.long()), TypeError, r"dtype int64, expected float32 or bfloat16 or float16"),
    "fill float64": (fill(lambda t: t.double()), TypeError, r"dtype float64, expected float32"),
    "fill strided": (fill(lambda t: t[::2]), ValueError, r"is not contiguous \(stride \(2,\)"),
    "fill transposed": (fill(lambda t: t.view(2, 2).t()), ValueError, r"expected contiguous"),
    "fill expanded": (fill(lambda t: t[:1].expand(4)), ValueError, r"expected contiguous"),
    "fill sparse": (fill(lambda t: t.to_sparse()), ValueError, r"torch.sparse_coo\), expected contiguous"),
    "empty list": (perturb(lambda t: []), ValueError, r"params is an empty list, expected at least one tensor"),
    "no list": (perturb(lambda t: t), TypeError, r"params must be a list of tensors, got Tensor"),
    "generator": (perturb(lambda t: iter([t])), TypeError, r"params must be a list of tensors, got list_iterator"),
    "not a tensor": (perturb(lambda t: [t, 3.0]), TypeError, r"params\[1\] must be a torch.Tensor, got float"),
    "second integer": (perturb(lambda t: [t, t.int()]), TypeError, r"tensor 1 of shape \(4,\) has dtype int32"),
    "second strided": (perturb(lambda t: [t, torch.ones(4, 2).t()]), ValueError, r"tensor 1 .* not contiguous"),
    "two devices": (perturb(lambda t: [t, on_meta(t)]), ValueError, r"tensor 1 .* is on meta, expected cpu"),
    "same tensor twice": (perturb(lambda t: [t, t]), ValueError, r"tensors 0 and 1 share memory"),
    "overlap": (perturb(lambda t: [t[2:], torch.ones(3), t[:3]]), ValueError, r"tensors 0 and 2 share memory"),
    "requires grad": (perturb(lambda t: [t.requires_grad_()]), ValueError, r"call it under torch.no_grad\(\)"),
    "scale nan": (perturb(scales=[NAN]), ValueError, r"a scale must be finite, got nan"),
    "scale inf": (perturb(scales=[-INF]), ValueError, r"a scale must be finite, got -inf"),
    "scale beyond fp32": (perturb(scales=[1e39]), ValueError, r"a scale must be finite in float32, got 1e\+39"),
    "scale tensor nan": (
        perturb(seeds=[1, 2], scales=torch.tensor([1.0, NAN])),
        ValueError,
        r"got nan at position 1",
    ),
    "scale rounds to inf": (perturb(scales=[TO_INF]), ValueError, r"a scale must be finite in float32, got 3.4"),
    "scale string": (perturb(scales=["1"]), TypeError, r"a scale must be a number, got '1' of type str"),
    "scale bool": (perturb(scales=[True]), TypeError, r"a scale must be a number, got True"),
    "scale scalar": (
        perturb(scales=1.0),
        TypeError,
        r"scales must be a list of numbers or a float32 tensor, got float",
    ),
    "scale tensor fp64": (perturb(scales=torch.ones(1).double()), TypeError, r"scales must be float32, got float64"),
    "decay nan": (perturb(decay=NAN), ValueError, r"decay must be finite, got nan"),
    "decay rounds to inf": (perturb(decay=TO_INF), ValueError, r"decay must be finite in float32, got 3.4"),
    "decay string": (perturb(decay="1"), TypeError, r"decay must be a number, got '1'"),
    "seed negative": (perturb(seeds=[-1]), ValueError, r"seed must be in 0 <= seed < 2\*\*64, got -1"),
    "seed too large": (perturb(seeds=[2**64]), ValueError, r"0 <= seed < 2\*\*64"),
    "seed float": (perturb(seeds=[1.0]), TypeError, r"seed must be an integer, got 1.0"),
    "seed bool": (perturb(seeds=[False]), TypeError, r"seed must be an integer, got False"),
    "seed scalar": (perturb(seeds=1), TypeError, r"seeds must be a list of integers or an int64 tensor, got int"),
    "seed tensor int32": (perturb(seeds=torch.ones(1).int()), TypeError, r"seeds must be int64, got int32"),
    "seed on meta": (perturb(seeds=on_meta(torch.ones(1).long())), ValueError, r"seeds must be on the CPU, got meta"),
    "seed tensor 2-d": (perturb(seeds=torch.ones(1, 1).long()), ValueError, r"one dimension, got shape \(1, 1\)"),
    "more seeds": (perturb(seeds=[1, 2]), ValueError, r"2 seeds but 1 scales"),
    "offset": (perturb(offset=-5), ValueError, r"offset must be .* got -5"),
    "offset end": (perturb(offset=2**63 - 3), ValueError, r"plus 4 elements reaches beyond index 2\*\*63"),
    "distribution": (perturb(distribution="uniform"), ValueError, r"'uniform'; known are gaussian, rademacher"),
    "backend": (perturb(backend="gpu"), ValueError, r"'gpu'; known are auto, native, triton, reference"),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_in_place_ops_reject_before_writing(case):
    call, error, message = IN_PLACE[case]
    t = torch.arange(4.0)
    with pytest.raises(error, match=message):
        call(t)
    assert torch.equal(t.detach(), torch.arange(4.0))


def freed(*shape, begin=0):
    """A tensor, `begin` elements into its storage, whose memory was given back: the shape stays."""
    whole = torch.ones(begin + math.prod(shape))
    view = whole[begin:].view(shape)
    whole.untyped_storage().resize_(0)
    return view


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_freed_memory_is_not_touched(backend):
    t, b = torch.arange(4.0), {"backend": backend}
    for begin in (0, 3, 2**20):  # a late part of a large buffer has an address that looks like one
        gone = freed(5, begin=begin)
        with pytest.raises(ValueError, match=r"fill_normal_: the memory of out of shape \(5,\) was freed"):
            kernels.fill_normal_(gone, 1, **b)
        with pytest.raises(ValueError, match=r"perturb_: the memory of tensor 0 of shape \(5,\) was freed"):
            kernels.perturb_([gone], [1], [1.0], **b)
        with pytest.raises(ValueError, match=r"the memory of tensor 2 of shape \(5,\) was freed"):
            kernels.perturb_([t, torch.empty(0), gone, t.clone()], [1], [1.0], **b)
    assert torch.equal(t, torch.arange(4.0))
    x, left, right = torch.ones(1, 3, 24), torch.ones(1, 24, 2), torch.ones(1, 2, 5)
    for name, call in {
        "theta": lambda: kernels.tt_factors(freed(LAYOUT.numel), LAYOUT, [1], [1.0], **b),
        "factors": lambda: kernels.tt_adapter(x, freed(1, LAYOUT.factor_numel), LAYOUT, **b),
        "R": lambda: kernels.tt_linear(x, left, freed(1, 2, 5), **b),
        "base": lambda: kernels.low_rank_linear(x, freed(1, 3, 5), left, right, **b),
    }.items():
        with pytest.raises(ValueError, match=f"the memory of {name} of shape"):
            call()


@pytest.mark.parametrize("name", ["seeds", "scales"])
def test_freed_seeds_and_scales_are_not_read(name):
    given, t = {"seeds": torch.tensor([1, 2]), "scales": torch.tensor([0.5, 1.0])}, torch.zeros(4)
    given[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"perturb_: the memory of {name} of shape \(2,\) was freed"):
        kernels.perturb_([t], **given)
    with pytest.raises(ValueError, match=rf"tt_factors: the memory of {name} of shape \(2,\) was freed"):
        kernels.tt_factors(torch.ones(LAYOUT.numel), LAYOUT, **given)
    assert not t.any()


def test_raw_ops_check_as_well():
    t, seeds, scales = torch.zeros(4), torch.tensor([1]), torch.tensor([NAN])
    with pytest.raises(ValueError, match="got nan"):
        torch.ops.adazeta.perturb_([t], seeds, scales, 0, 1.0, "gaussian", None)
    with pytest.raises(ValueError, match="decay must be finite"):
        torch.ops.adazeta.perturb_([t], seeds, torch.ones(1), 0, INF, "gaussian", None)
    with pytest.raises(ValueError, match="known are gaussian"):
        torch.ops.adazeta.fill_normal_(t, 1, 0, "poisson", None)
    assert torch.equal(t, torch.zeros(4))


def test_what_is_fine():
    """The edges next to the errors above."""
    t = torch.zeros(4)
    kernels.perturb_([torch.zeros(0), t, torch.zeros(0, 3)], [], [], decay=1.0)
    assert torch.equal(t, torch.zeros(4))
    kernels.perturb_([torch.zeros(0)], [2**64 - 1], [1.0])
    kernels.perturb_((t[:2], t[2:]), [np.int64(5)], [np.float32(1.0)], offset=2**63 - 4)
    assert torch.equal(t, kernels.fill_normal_(torch.empty(4), 5, offset=2**63 - 4))
    leaf = torch.zeros(4, requires_grad=True)
    with torch.no_grad():
        kernels.perturb_([leaf], [5], [1])
        assert kernels.fill_normal_(leaf, 5) is leaf
    kernels.perturb_([t], [1], [0.0], decay=0.0)
    assert torch.equal(t, torch.zeros(4))


def factors_call(theta=None, layout=LAYOUT, seeds=(1,), scales=(1.0,), **kwargs):
    return lambda: kernels.tt_factors(
        torch.ones(LAYOUT.numel) if theta is None else theta, layout, seeds, scales, **kwargs
    )


def adapter_call(x=None, factors=None, layout=LAYOUT, **kwargs):
    x = torch.ones(2, 3, 24) if x is None else x
    return lambda: kernels.tt_adapter(
        x, torch.ones(2, LAYOUT.factor_numel) if factors is None else factors, layout, **kwargs
    )


def linear_call(**replaced):
    args = {"x": torch.ones(2, 3, 24), "L": torch.ones(2, 24, 4), "R": torch.ones(2, 4, 8), "bias": torch.ones(2, 8)}
    return lambda: kernels.tt_linear(**{**args, **replaced})


def low_rank_call(**replaced):
    args = {"x": torch.ones(2, 3, 24), "base": torch.ones(2, 3, 8), "A": torch.ones(2, 24, 4), "B": torch.ones(2, 4, 8)}
    return lambda: kernels.low_rank_linear(**{**args, **replaced})


F = LAYOUT.factor_numel
FORWARD = [
    (factors_call(torch.ones(7)), ValueError, rf"theta must have shape \({LAYOUT.numel},\), got \(7,\)"),
    (factors_call(torch.ones(LAYOUT.numel, 1)), ValueError, r"theta must have shape"),
    (factors_call(torch.ones(LAYOUT.numel).half()), TypeError, r"theta must be float32 or float64, got float16"),
    (factors_call([1.0]), TypeError, r"theta must be a torch.Tensor, got list"),
    (factors_call(layout=LAYOUT.encode()), TypeError, r"layout must be a TTAdapterLayout, got list"),
    (factors_call(seeds=[], scales=[]), ValueError, r"no seeds given, expected at least one probe"),
    (factors_call(seeds=[1, 2]), ValueError, r"2 seeds but 1 scales"),
    (factors_call(seeds=on_meta(torch.ones(1).long())), ValueError, r"seeds must be on the CPU, got meta"),
    (factors_call(scales=on_meta(torch.ones(1))), ValueError, r"scales must be on the CPU, got meta"),
    (factors_call(seeds=[2**64]), ValueError, r"0 <= seed < 2\*\*64"),
    (factors_call(scales=[NAN]), ValueError, r"finite, got nan"),
    (factors_call(scales=torch.tensor([INF])), ValueError, r"got inf at position 0"),
    (factors_call(offset=2**63 - 1), ValueError, r"reaches beyond index 2\*\*63"),
    (factors_call(distribution="x"), ValueError, r"known are gaussian, rademacher"),
    (factors_call(adapters=0), ValueError, r"adapters must be at least 1 and below 2\*\*63, got 0"),
    (factors_call(adapters=2**64 - 1), ValueError, r"adapters must be at least 1 and .*, got 18446744073709551615"),
    (factors_call(adapters=1.0), TypeError, r"adapters must be an integer, got 1.0"),
    (factors_call(adapters=True), TypeError, r"adapters must be an integer, got True"),
    (factors_call(adapters=2), ValueError, rf"shape \({2 * LAYOUT.numel},\) for 2 adapters, got \({LAYOUT.numel},\)"),
    (factors_call(torch.ones(2 * LAYOUT.numel)), ValueError, rf"theta must have shape \({LAYOUT.numel},\), got"),
    (
        factors_call(torch.ones(2 * LAYOUT.numel), adapters=2, offset=2**63 - LAYOUT.numel - 1),
        ValueError,
        r"reaches beyond index 2\*\*63",
    ),
    (factors_call(backend="x"), ValueError, r"known are auto, native"),
    (adapter_call(torch.ones(3, 24)), ValueError, r"x must have shape \(P, T, d\), probes first, got \(3, 24\)"),
    (adapter_call(torch.ones(2, 3, 23)), ValueError, r"x has width 23, expected 24"),
    (adapter_call(torch.ones(3, 3, 24)), ValueError, rf"factors has shape \(2, {F}\), expected \(P, F\) = \(3, {F}\)"),
    (adapter_call(torch.ones(0, 3, 24), torch.ones(0, F)), ValueError, r"x has no probes"),
    (adapter_call(torch.ones(2, 3, 24).int()), TypeError, r"x has dtype int32, expected float32 or"),
    (adapter_call(factors=torch.ones(2, F).bfloat16()), TypeError, r"factors is bfloat16, expected float32 for x of"),
    (adapter_call(factors=torch.ones(2, F).double()), TypeError, r"factors is float64, expected float32"),
    (adapter_call(factors=torch.ones(2, F, device="meta")), ValueError, r"factors is on meta, expected cpu"),
    (adapter_call(act="swish"), ValueError, r"unknown act 'swish'; known are relu, gelu, silu, tanh, identity"),
    (adapter_call(scale=NAN), ValueError, r"scale must be finite, got nan"),
    (adapter_call(scale=TO_INF), ValueError, r"scale must be finite in float32, got 3.4"),
    (adapter_call(scale="1"), TypeError, r"scale must be a number"),
    (adapter_call(backend="x"), ValueError, r"known are auto, native"),
    (adapter_call(layout=None), TypeError, r"layout must be a TTAdapterLayout, got NoneType"),
    (linear_call(L=torch.ones(2, 24)), ValueError, r"L must have three dimensions, probes first, got \(2, 24\)"),
    (linear_call(L=torch.ones(2, 24, 5)), ValueError, r"rank 5 of L \(2, 24, 5\) and rank 4 of R"),
    (linear_call(L=torch.ones(1, 24, 4)), ValueError, r"L has shape \(1, 24, 4\), expected \(P, d_in, r\)"),
    (linear_call(bias=torch.ones(8)), ValueError, r"bias has shape \(8,\), expected \(P, d_out\) = \(2, 8\)"),
    (linear_call(R=torch.ones(2, 4, 8).half()), TypeError, r"R is float16, expected float32"),
    (linear_call(bias=0.0), TypeError, r"bias must be a torch.Tensor, got float"),
    (low_rank_call(base=torch.ones(2, 3, 9)), ValueError, r"base has shape .* expected \(P, T, d_out\) = \(2, 3, 8\)"),
    (low_rank_call(base=torch.ones(2, 3, 8).half()), TypeError, r"base is float16, expected float32 as x"),
    (low_rank_call(B=torch.ones(2, 3, 8)), ValueError, r"rank 4 of A \(2, 24, 4\) and rank 3 of B"),
    (low_rank_call(scale=INF), ValueError, r"scale must be finite, got inf"),
    (low_rank_call(A=None), TypeError, r"A must be a torch.Tensor, got NoneType"),
]


@pytest.mark.parametrize(("call", "error", "message"), FORWARD, ids=range(len(FORWARD)))
def test_forward_ops_reject(call, error, message):
    with pytest.raises(error, match=message):
        call()
