"""tt_factors against a dense contraction in float64, and virtual perturbation against perturb_ in place."""

import pytest
import torch

from adazeta_kernels import TTAdapterLayout, fill_normal_, perturb_, tt_factors
from adazeta_kernels.backends.reference import tt as reference
from adazeta_kernels.testing import assert_as_exact_as, dense_map

LAYOUTS = {
    "576x64": TTAdapterLayout.auto(576, 64, 5),
    "4096x64": TTAdapterLayout.auto(4096, 64, 5),
    "nobias": TTAdapterLayout.auto(96, 16, 3, bias=False),
    "ranks": TTAdapterLayout.auto(120, 24, (2, 3, 4, 3, 2)),
    "rank1": TTAdapterLayout.auto(48, 8, 1),
    "2cores": TTAdapterLayout.auto(77, 6, 4),
    "1core": TTAdapterLayout.auto(13, 64, 5, shapes={"width": (13,)}),
}
SEEDS, SCALES = [0, 7, 2**63, 2**64 - 1], [0.0, 1e-3, -0.5, 1.0]


@pytest.fixture(params=LAYOUTS, ids=list(LAYOUTS))
def layout(request):
    return LAYOUTS[request.param]


def theta_for(layout, dtype=torch.float32):
    return (torch.randn(layout.numel, dtype=torch.float64) * 0.3).to(dtype)


def cores_of(theta, layout, name):
    return [
        theta[s.offset : s.offset + s.numel].reshape(s.shape)
        for s in layout.segments()
        if s.name.startswith(name) and not s.is_bias
    ]


def dense_maps(theta, layout, dtype=torch.float64):
    """`L R` of both maps, from one einsum over all cores."""
    return [dense_map(cores_of(theta, layout, n), s, dtype) for n, s in (("down", layout.down), ("up", layout.up))]


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_factors_multiply_to_the_dense_map(layout, distribution):
    theta = theta_for(layout)
    factors = tt_factors(theta, layout, SEEDS, SCALES, offset=5, distribution=distribution)
    assert factors.shape == (4, layout.factor_numel) and factors.dtype == torch.float32
    for probe, (seed, scale) in enumerate(zip(SEEDS, SCALES, strict=True)):
        z = fill_normal_(torch.empty(layout.numel), seed, offset=5, distribution=distribution)
        moved = theta.double() + torch.tensor(scale).double() * z.double()
        l1, r1, b1, l2, r2, b2 = layout.split_factors(factors[probe : probe + 1])
        dense, plain = dense_maps(moved, layout), dense_maps(moved, layout, torch.float32)
        for left, right, expected, in_float32 in zip((l1, l2), (r1, r2), dense, plain, strict=True):
            assert_as_exact_as((left[0].double() @ right[0].double()).float(), in_float32, expected)
        if layout.bias:
            for bias, name in ((b1, "down.bias"), (b2, "up.bias")):
                s = next(s for s in layout.segments() if s.name == name)
                assert torch.equal(bias[0], moved[s.offset : s.offset + s.numel].float())


def test_float64_theta_is_an_exact_oracle(layout):
    theta = theta_for(layout, torch.float64)
    factors = tt_factors(theta, layout, SEEDS, SCALES, offset=11)
    assert factors.dtype == torch.float64
    for probe, (seed, scale) in enumerate(zip(SEEDS, SCALES, strict=True)):
        z = fill_normal_(torch.empty(layout.numel), seed, offset=11).double()
        moved = theta + torch.tensor(scale).double() * z
        l1, r1, _, l2, r2, _ = layout.split_factors(factors[probe : probe + 1])
        for left, right, dense in zip((l1, l2), (r1, r2), dense_maps(moved, layout), strict=True):
            assert (left[0] @ right[0] - dense).abs().max() <= 1e-13 * dense.abs().max()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_virtual_perturbation_has_the_bits_of_perturb_in_place(layout, backend, distribution):
    theta = theta_for(layout)
    before = theta.clone()
    offset = 2**33 + 3
    factors = tt_factors(theta, layout, SEEDS, SCALES, offset=offset, distribution=distribution, backend=backend)
    assert torch.equal(theta, before)
    rows = []
    for seed, scale in zip(SEEDS, SCALES, strict=True):
        copy = theta.clone()
        perturb_([copy], [seed], [scale], offset=offset, distribution=distribution, backend=backend)
        # Four probes at once as well: a batched product may sum in another order than a single one.
        rows.append(tt_factors(copy, layout, SEEDS, [0.0] * 4, backend=backend)[0])
    assert torch.equal(factors, torch.stack(rows))


def test_backends_agree(layout):
    """Biases, which are not contracted, to the bit; products of cores to rounding."""
    theta = theta_for(layout)
    args = (theta, layout, SEEDS, SCALES)
    got, expected = (layout.split_factors(tt_factors(*args, backend=b)) for b in ("auto", "reference"))
    exact = layout.split_factors(tt_factors(theta.double(), layout, SEEDS, SCALES))
    for position, (a, b, c) in enumerate(zip(got, expected, exact, strict=True)):
        if position in (2, 5):
            assert (a is None and b is None) or torch.equal(a, b)
        else:
            assert_as_exact_as(a, b, c)


def test_each_probe_is_what_it_is_alone(layout):
    theta = theta_for(layout)
    together = tt_factors(theta, layout, SEEDS, SCALES)
    for probe, (seed, scale) in enumerate(zip(SEEDS, SCALES, strict=True)):
        alone = tt_factors(theta, layout, [seed], [scale])
        assert alone.shape == (1, layout.factor_numel)
        # Batched and single products may sum in another order.
        assert (together[probe] - alone[0]).abs().max() <= 1e-6 * alone.abs().max()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_many_adapters_have_the_bits_of_single_calls(layout, backend, distribution):
    options = {"distribution": distribution, "backend": backend}
    theta, offset = torch.randn(3 * layout.numel) * 0.3, 2**34 - 2 * layout.numel + 3
    factors = tt_factors(theta, layout, SEEDS, SCALES, offset=offset, adapters=3, **options)
    assert factors.shape == (3, 4, layout.factor_numel) and factors.is_contiguous()
    for adapter, part in enumerate(theta.split(layout.numel)):
        alone = tt_factors(part, layout, SEEDS, SCALES, offset=offset + adapter * layout.numel, **options)
        assert torch.equal(factors[adapter], alone)


def test_one_adapter_of_many_is_an_adapter():
    layout = LAYOUTS["rank1"]
    theta = theta_for(layout)
    alone = tt_factors(theta, layout, SEEDS, SCALES)
    assert torch.equal(tt_factors(theta, layout, SEEDS, SCALES, adapters=1), alone[None])


def test_many_adapters_in_float64():
    layout = LAYOUTS["nobias"]
    theta = torch.randn(2 * layout.numel, dtype=torch.float64)
    factors = tt_factors(theta, layout, SEEDS, SCALES, offset=7, adapters=2)
    alone = tt_factors(theta[layout.numel :], layout, SEEDS, SCALES, offset=7 + layout.numel)
    assert factors.dtype == torch.float64 and torch.equal(factors[1], alone)


def test_seed_tensors_and_lists_are_the_same():
    layout = LAYOUTS["576x64"]
    theta = theta_for(layout)
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in SEEDS])
    tensors = tt_factors(theta, layout, signed, torch.tensor(SCALES))
    assert torch.equal(tensors, tt_factors(theta, layout, SEEDS, SCALES))


def test_scale_zero_is_theta_itself():
    layout = LAYOUTS["576x64"]
    theta = theta_for(layout)
    factors = tt_factors(theta, layout, [1, 2], [0.0, 0.0])
    assert_as_exact_as(
        factors,
        reference.contract_cores(theta.expand(2, -1), layout),
        reference.contract_cores(theta.double().expand(2, -1), layout),
    )
    assert torch.equal(factors[0], factors[1])


def test_offset_shifts_the_direction():
    layout = LAYOUTS["rank1"]
    theta = torch.zeros(layout.numel)
    z = fill_normal_(torch.empty(layout.numel + 4), 3)
    factors = tt_factors(theta, layout, [3], [1.0], offset=4)
    bias = next(s for s in layout.segments() if s.name == "down.bias")
    got = layout.split_factors(factors)[2][0]
    assert torch.equal(got, z[4 + bias.offset : 4 + bias.offset + bias.numel])


def test_non_contiguous_theta():
    layout = LAYOUTS["576x64"]
    wide = torch.randn(layout.numel, 2)
    assert torch.equal(
        tt_factors(wide[:, 0], layout, SEEDS, SCALES), tt_factors(wide[:, 0].contiguous(), layout, SEEDS, SCALES)
    )


def test_gradient_flows_to_theta_at_the_perturbed_point():
    layout = TTAdapterLayout.auto(12, 8, 2)
    theta = theta_for(layout, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: tt_factors(t, layout, [1, 2], [0.0, 0.3]), theta)
    twice = torch.cat([theta.detach()] * 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: tt_factors(t, layout, [1, 2], [0.0, 0.3], adapters=2), twice)
    theta32 = theta.detach().float().requires_grad_()
    recorded = tt_factors(theta32, layout, [1, 2], [0.0, 0.3])
    assert recorded.requires_grad
    with torch.no_grad():
        plain = tt_factors(theta32, layout, [1, 2], [0.0, 0.3])
    assert not plain.requires_grad
    assert (recorded - plain).abs().max() <= 1e-6 * plain.abs().max()
