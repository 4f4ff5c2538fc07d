"""What tests of several backends share: inputs, and the comparisons made with them."""

import torch

from adazeta_kernels import TTAdapterLayout, TTShape
from adazeta_kernels.backends.reference.tt import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DISTRIBUTIONS = ["gaussian", "rademacher"]
EPS = 2.0**-24
# Widths below, at and off multiples of vectors and tiles; ranks on both sides of what is unrolled or padded, up to the
# limit.
LAYOUTS = {
    "576-64-r5": TTAdapterLayout.auto(576, 64, 5),
    "576-8-r2": TTAdapterLayout.auto(576, 8, 2),
    "77-6-r4": TTAdapterLayout.auto(77, 6, 4),
    "45-15-r7-nobias": TTAdapterLayout.auto(45, 15, 7, bias=False),
    "12-8-r1": TTAdapterLayout.auto(12, 8, 1),
    "unequal": TTAdapterLayout(
        120, 24, TTShape((4, 5, 6), (2, 3, 4), (2, 3, 4, 3, 2)), TTShape((24,), (5, 24), (9, 2)), True
    ),
    "130-70-r64": TTAdapterLayout.auto(130, 70, 64, shapes={"width": (10, 13), "bottleneck": (7, 10)}),
}
_DEEP = TTShape((2, 1, 3, 2, 2, 1, 2, 2), (2, 2, 1, 3, 2, 1, 1, 5), (2, 2, 3, 4, 5, 4, 3, 6, 2, 3, 2, 3, 1, 3, 2))
DEEP = TTAdapterLayout(96, 120, _DEEP, _DEEP.mirror)  # as many cores as native takes
# P, T, d_in, r, d_out of tt_linear and low_rank_linear, chosen as the layouts are.
LOW_RANK_SHAPES = [
    (1, 1, 576, 5, 64),
    (1, 9, 64, 5, 576),
    (4, 1, 24, 3, 10),
    (3, 130, 77, 1, 1200),
    (1, 1, 8, 1, 8),
    (3, 13, 100, 5, 37),
    (2, 9, 2500, 12, 64),
    (1, 17, 7, 64, 3),
    (2, 37, 72, 5, 40),
    (1, 33, 2056, 6, 2064),
]


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def bits(tensor):
    """The bits of a tensor as integers, on the CPU."""
    return tensor.cpu().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def same(left, right):
    """Bit-identical, but for the payload of a NaN."""
    nan = left.isnan() & right.isnan()
    return torch.equal(bits(left.where(~nan, 0)), bits(right.where(~nan, 0)))


def adapter_inputs(layout, probes, tokens, dtype, device="cpu"):
    """x and factors."""
    factors = torch.randn(probes, layout.factor_numel, device=device) / layout.max_bond**0.5
    return torch.randn(probes, tokens, layout.width, device=device).to(dtype), factors


def low_rank_inputs(probes, tokens, d_in, rank, d_out, dtype, device="cpu"):
    """x, base, left, right and bias."""
    x, base = (torch.randn(probes, tokens, d, device=device).to(dtype) for d in (d_in, d_out))
    left = torch.randn(probes, d_in, rank, device=device) / d_in**0.5
    right = torch.randn(probes, rank, d_out, device=device) / rank**0.5
    return x, base, left, right, torch.randn(probes, d_out, device=device)


def assert_activations(x, activated):
    """Hold activations, name -> float32 results for x, to errors in units of rounding."""
    wide = x.double()
    exact = {
        "relu": wide.clamp(min=0),
        "gelu": wide * 0.5 * torch.special.erfc(-wide / 2**0.5),
        "silu": wide * torch.sigmoid(wide),
        "tanh": wide.tanh(),
        "identity": wide,
    }
    error = {act: (activated[act].double() - expected).abs() for act, expected in exact.items()}
    assert (error["tanh"] <= 4 * EPS * wide.tanh().abs()).all()
    assert (error["silu"] <= 3 * EPS * wide.abs() + 1e-35).all()
    assert (error["gelu"] <= 2 * EPS * wide.abs()).all()
    assert (error["gelu"] <= 6 * EPS * exact["gelu"].abs())[wide >= -1].all()
    assert error["relu"].max() == 0 and error["identity"].max() == 0


def assert_infinities(activated):
    """Hold activated(act, values) to torch's float64 activations of what is not finite."""
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0])
    for act, activation in ACTIVATIONS.items():
        got = activated(act, values)
        assert torch.allclose(got.double(), activation(values.double()), rtol=1e-5, atol=0, equal_nan=True), (act, got)


def alone(values):
    """x, factors and layout of an adapter that gives act(values) at 20 tokens each. Its bottleneck of 1 is the bias, so
    that no infinity meets a zero of another number."""
    shape = TTShape((1,), (1,), (1,))
    factors = torch.tensor([[0.0, 0.0, value, 1.0, 1.0, 0.0] for value in values])
    return torch.zeros(len(values), 20, 1), factors, TTAdapterLayout(1, 1, shape, shape)


def lists_here_and_on_gpu(count, dtypes=DTYPES):
    """Tensors of 0 to 5,000 elements, each on the CPU and on the GPU, some misaligned."""
    generator = torch.Generator().manual_seed(count)
    here, there = [], []
    for position in range(count):
        numel = int(torch.randint(0, 5000 if position % 3 == 0 else 40, (), generator=generator))
        tensor = torch.randn(numel, generator=generator).to(dtypes[position % len(dtypes)])
        shifted = torch.empty(numel + 8, dtype=tensor.dtype, device="cuda")[position % 5 :][:numel]
        here.append(tensor)
        there.append(shifted.copy_(tensor))
    return here, there
