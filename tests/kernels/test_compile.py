"""torch.compile(fullgraph=True) for all six ops; opcheck for them and for the one that is not public."""

import pytest
import torch

import adazeta_kernels as kernels
from adazeta_kernels import TTAdapterLayout

LAYOUT = TTAdapterLayout.auto(24, 8, 2)
OPS = torch.ops.adazeta
SEEDS, SCALES = torch.tensor([3, -1, 7]), torch.tensor([0.0, 0.5, -1e-3])


def factors():
    return kernels.tt_factors(torch.ones(LAYOUT.numel) * 0.3, LAYOUT, SEEDS, SCALES)


def triple(d_out):
    return torch.randn(3, 24, 2), torch.randn(3, 2, d_out), torch.randn(3, d_out)


CASES = {
    "fill_normal_": lambda: (OPS.fill_normal_, (torch.zeros(9), -5, 2, "gaussian", None)),
    "fill_normal_bf16": lambda: (OPS.fill_normal_, (torch.zeros(9).bfloat16(), 5, 0, "rademacher", "reference")),
    "perturb_": lambda: (OPS.perturb_, ([torch.ones(5), torch.ones(2, 3)], SEEDS, SCALES, 0, 0.9, "gaussian", None)),
    "perturb_empty": lambda: (OPS.perturb_, ([torch.ones(0), torch.ones(1)], SEEDS, SCALES, 0, 1.0, "gaussian", None)),
    "tt_factors": lambda: (
        OPS.tt_factors,
        (torch.randn(LAYOUT.numel), LAYOUT.encode(), SEEDS, SCALES, 0, None, "gaussian", None),
    ),
    "tt_factors_fp64": lambda: (
        OPS.tt_factors,
        (torch.randn(LAYOUT.numel).double(), LAYOUT.encode(), SEEDS, SCALES, 0, None, "gaussian", None),
    ),
    "tt_factors_of_many": lambda: (
        OPS.tt_factors,
        (torch.randn(3 * LAYOUT.numel), LAYOUT.encode(), SEEDS, SCALES, 9, 3, "gaussian", None),
    ),
    "perturb_rows": lambda: (OPS.perturb_rows, (torch.randn(9), SEEDS, SCALES, 2, "gaussian", None)),
    "tt_adapter": lambda: (OPS.tt_adapter, (torch.randn(3, 4, 24), factors(), LAYOUT.encode(), "gelu", 0.5, None)),
    "tt_adapter_bf16": lambda: (
        OPS.tt_adapter,
        (torch.randn(4, 3, 24).transpose(0, 1).bfloat16(), factors(), LAYOUT.encode(), "relu", 1.0, None),
    ),
    "tt_adapter_no_token": lambda: (
        OPS.tt_adapter,
        (torch.randn(3, 0, 24), factors(), LAYOUT.encode(), "relu", 1.0, None),
    ),
    "tt_linear": lambda: (OPS.tt_linear, (torch.randn(3, 4, 24), *triple(8), None)),
    "tt_linear_nobias": lambda: (OPS.tt_linear, (torch.randn(3, 4, 24).half(), *triple(8)[:2], None, None)),
    "low_rank_linear": lambda: (
        OPS.low_rank_linear,
        (torch.randn(3, 4, 24), torch.randn(3, 4, 8), *triple(8)[:2], 0.5, None),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    op, args = CASES[name]()
    torch.library.opcheck(op.default, args)


def test_every_op_has_an_opcheck():
    checked = {CASES[name]()[0].default._schema.name for name in CASES}
    registered = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("adazeta::")}
    assert registered == checked and len(registered) == 7


def step(theta, x, base, seeds, scales):
    """All six ops in one graph."""
    z = kernels.fill_normal_(torch.empty_like(theta), 2**63 + 5, offset=3)
    moved = theta.clone()
    kernels.perturb_([moved, z], seeds, scales, decay=0.5)
    f = kernels.tt_factors(moved, LAYOUT, seeds, scales)
    y = kernels.tt_adapter(x, f, LAYOUT, act="silu", scale=0.5)
    left, right, bias, _, _, _ = LAYOUT.split_factors(f)
    h = kernels.tt_linear(y, left, right, bias)
    return kernels.low_rank_linear(y, base, left, right, scale=2.0) + h, moved, z


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad_mode"])
def test_one_graph_with_the_results_of_eager(grad):
    args = (torch.randn(LAYOUT.numel), torch.randn(3, 5, 24), torch.randn(3, 5, 8), SEEDS, SCALES)
    with torch.set_grad_enabled(grad):
        expected = step(*args)
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_lists_of_seeds_compile_too():
    theta = torch.randn(LAYOUT.numel)

    def call(theta, seeds, scales):
        return kernels.tt_factors(theta, LAYOUT, seeds, scales)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for seeds in ([1, 2], [5, 2**63 + 1], [2**64 - 1, 0]):
        assert torch.equal(compiled(theta, seeds, [0.5, -1.0]), call(theta, seeds, [0.5, -1.0]))


def test_factors_of_many_adapters_compile_too():
    def call(theta):
        return kernels.tt_factors(theta, LAYOUT, SEEDS, SCALES, adapters=2) * 2

    theta = torch.randn(2 * LAYOUT.numel)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(theta), call(theta))


def test_token_count_may_change_without_a_new_graph():
    f = factors()

    def call(x, scale):
        return kernels.tt_adapter(x, f, LAYOUT, scale=scale)

    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(call, fullgraph=True, backend=counting, dynamic=True)
    for tokens in (5, 7, 9):  # never 3: torch would take it for the number of probes
        x = torch.randn(3, tokens, 24)
        assert torch.equal(compiled(x, 0.5), call(x, 0.5))
    assert len(graphs) == 1
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        compiled(torch.randn(3, 3, 24), float("nan"))


def test_bad_shape_is_caught_while_tracing():
    compiled = torch.compile(lambda x: kernels.tt_adapter(x, factors(), LAYOUT), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"x has width 25, expected 24 of the layout"):
        compiled(torch.randn(3, 4, 25))


def test_gradient_through_a_compiled_adapter():
    theta = (torch.randn(LAYOUT.numel) * 0.3).requires_grad_()
    x = torch.randn(1, 5, 24)

    def loss(theta):
        f = kernels.tt_factors(theta, LAYOUT, [5], [0.5])
        return kernels.tt_adapter(x, f, LAYOUT, act="gelu").square().sum()

    (expected,) = torch.autograd.grad(loss(theta), theta)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(theta), theta)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
