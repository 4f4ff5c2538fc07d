"""Directions, fill_normal_, perturb_ and perturb_rows in the interpreter give the bits of the native CPU kernels."""

import json
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DTYPES, bits, same

import adazeta_kernels as kernels
from adazeta_kernels.backends import native
from adazeta_kernels.backends import triton as backend
from adazeta_kernels.backends.triton import launch, rng
from adazeta_kernels.backends.triton.elementwise import DISTRIBUTIONS

VECTORS = json.loads((Path(__file__).parents[1] / "vectors.json").read_text())
# As on a GPU, where a tile is small and a list has many.
SMALL_TILES = [
    launch.Configuration((("BLOCK", 1024), ("GROUP", 4))),
    launch.Configuration((("BLOCK", 2048), ("GROUP", 8))),
]

both_distributions = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


@triton.jit
def at_indices(index, seeds, one, four, COUNT: tl.constexpr, DISTRIBUTION: tl.constexpr):
    """Each element by `direction`, and its block by `direction4`, for COUNT (seed, index) pairs."""
    lanes = tl.arange(0, COUNT)
    seed_lo, seed_hi = rng.split_seed(tl.load(seeds + lanes))
    i = tl.load(index + lanes)
    tl.store(one + lanes, rng.direction(seed_lo, seed_hi, i, DISTRIBUTION))
    z0, z1, z2, z3 = rng.direction4(seed_lo, seed_hi, i >> 2, DISTRIBUTION)
    tl.store(four + 4 * lanes, z0)
    tl.store(four + 4 * lanes + 1, z1)
    tl.store(four + 4 * lanes + 2, z2)
    tl.store(four + 4 * lanes + 3, z3)


@both_distributions
def test_vectors_of_the_specification(distribution):
    rows = list(VECTORS["elements"])
    count = triton.next_power_of_2(len(rows))
    rows += rows[:1] * (count - len(rows))
    seeds = torch.tensor([row["seed"] - 2**64 * (row["seed"] >= 2**63) for row in rows])
    index = torch.tensor([row["index"] for row in rows])
    one, four = torch.empty(count), torch.empty(count, 4)
    at_indices[(1,)](index, seeds, one, four, COUNT=count, DISTRIBUTION=DISTRIBUTIONS[distribution])
    want = torch.tensor([int(row[distribution], 16) for row in rows]).to(torch.int32)
    assert torch.equal(bits(one), want)
    assert torch.equal(bits(four.gather(1, (index % 4)[:, None])[:, 0]), want)


@both_distributions
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_million_elements(dtype, distribution):
    got, want = torch.empty(2, 1_000_003, dtype=dtype)
    backend.fill_normal_(got, 11, 2**34 - 500_001, distribution)
    native.fill_normal_(want, 11, 2**34 - 500_001, distribution)
    assert torch.equal(bits(got), bits(want))
    theta = torch.randn(1_000_003).to(dtype)
    copy = theta.clone()
    for module, tensor in ((backend, theta), (native, copy)):
        module.perturb_([tensor], torch.tensor([-3]), torch.tensor([0.3]), 2**32 - 500_001, 0.9, distribution)
    assert same(theta, copy)


@both_distributions
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fill_normal_of_ragged_shapes(dtype, distribution):
    """Around blocks and tiles, at every offset of memory and of the index, in one tile and in several."""
    cases = [(1, 2**63 - 1), (5, 2**32 - 3), (2049, 7), (3000, 2**39 - 70), (1024, 8)]
    for begin, (numel, offset) in enumerate(cases):
        for configuration in [None, SMALL_TILES[dtype != torch.float32]][: 1 + (numel > 2000)]:
            out = torch.full((begin + numel + 1,), 3.0, dtype=dtype)
            part = out[begin : begin + numel]
            backend.fill_normal_(part, 2**64 - 3, offset, distribution, configuration=configuration)
            want = torch.empty(numel, dtype=dtype)
            native.fill_normal_(want, 2**64 - 3, offset, distribution)
            assert torch.equal(bits(part), bits(want)), (numel, offset, configuration)
            assert (out[:begin] == 3).all() and out[-1] == 3, "wrote outside of the tensor"


def lists(shapes, dtypes, begin=0):
    """Tensors that begin `begin`, `begin` + 1 ... elements into their memory."""
    whole = [torch.randn(begin + k + torch.Size(s).numel()).to(dtypes[k % len(dtypes)]) for k, s in enumerate(shapes)]
    return [w[begin + k :].view(s) for k, (w, s) in enumerate(zip(whole, shapes))]


def assert_perturbed_as_native(params, seeds, scales, offset=0, decay=1.0, distribution="gaussian", **kwargs):
    seeds, scales = torch.tensor(seeds, dtype=torch.int64), torch.tensor(scales)
    expected = [p.clone() for p in params]
    native.perturb_(expected, seeds, scales, offset, decay, distribution)
    backend.perturb_(params, seeds, scales, offset, decay, distribution, **kwargs)
    for position, (got, want) in enumerate(zip(params, expected, strict=True)):
        assert same(got, want), (position, seeds, scales, offset, decay)


LISTS = {"float32": DTYPES[:1], "bfloat16": DTYPES[1:2], "float16": DTYPES[2:], "mixed": DTYPES}


@pytest.mark.parametrize(
    "dtypes, distribution",
    [(name, "gaussian") for name in LISTS] + [("mixed", "rademacher"), ("float16", "rademacher")],
)
def test_perturb_of_lists(dtypes, distribution):
    dtypes = LISTS[dtypes]
    shapes = [(3,), (0,), (2, 0, 3), (700,), (1,)]
    for offset, decay, seeds, scales in (
        (2**34 - 40, 0.9, [-1, 3], [0.5, -2.0]),
        (2**32 + 65, 1.0, [7, 7], [0.25, 0.0]),
        (129, 0.5, [], []),
    ):
        assert_perturbed_as_native(lists(shapes, dtypes), seeds, scales, offset, decay, distribution)
    # Tensors of one tile and of several, beginning on 16 bytes and elsewhere.
    for configuration, begin in zip(SMALL_TILES, (0, 3)):
        params = lists([(2500,), (5,), (2048,)], dtypes, begin)
        assert_perturbed_as_native(params, [5], [0.1], 8, 1.0, distribution, configuration=configuration)


def test_a_list_is_its_concatenation():
    whole = torch.randn(1003)
    pieces = [p.clone() for p in whole.split([1, 63, 0, 64, 875])]
    for params in ([whole], pieces):
        kernels.perturb_(params, [1, 2], [0.1, 0.2], offset=2**32 - 50, backend="triton")
    assert torch.equal(torch.cat(pieces), whole)


def test_nothing_to_do():
    kernels.fill_normal_(torch.empty(0, 3), 1, backend="triton")
    kernels.perturb_([torch.empty(0), torch.empty(2, 0).half()], [1], [1.0], backend="triton")
    assert backend.perturb_rows(torch.empty(0), torch.tensor([1]), torch.tensor([1.0]), 0, "gaussian").shape == (1, 0)


def test_scale_zero_leaves_every_bit():
    theta = torch.tensor([-0.0, 0.0, 1e-45, -1e-45, torch.inf, 3.0])
    moved = theta.clone()
    kernels.perturb_([moved], [1, 2], [0.0, -0.0], backend="triton")
    rows = backend.perturb_rows(theta, torch.tensor([1, 2]), torch.tensor([0.0, -0.0]), 0, "gaussian")
    assert torch.equal(bits(moved), bits(theta))
    assert all(torch.equal(bits(row), bits(theta)) for row in rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number_survives(dtype):
    """Subnormals, infinities and NaN among them, widened and rounded back, alone and doubled."""
    for decay in (1.0, 2.0):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        assert_perturbed_as_native([every], [], [], decay=decay)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_half_precision(dtype):
    """Rademacher with theta = 1 puts sums on ties and next to them; large scales overflow."""
    unit = torch.finfo(dtype).eps
    values = torch.tensor([1.0, -1.0 - unit, torch.finfo(dtype).max, torch.finfo(dtype).tiny / 4])
    for scale in (unit / 2, unit / 2 * (1 + 2**-20), unit / 4, unit * 1.5, torch.finfo(dtype).max):
        theta = values.to(dtype).repeat(64)
        assert_perturbed_as_native([theta], [5], [scale], distribution="rademacher")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_and_subnormal_theta(dtype):
    theta = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1.0, 1e-40, 3e38] * 20).to(dtype)
    for scale, decay in ((0.5, 0.5), (1e-41, 1.0), (3e38, 1.0), (1.0, -0.0)):
        assert_perturbed_as_native([theta.clone()], [1], [scale], decay=decay)


@both_distributions
def test_rows(distribution):
    for numel, offset, rows, configuration in (
        (1, 0, 3, None),
        (5001, 2**34 - 100, 4, None),
        (1030, 2**63 - 1030, 2, SMALL_TILES[0]),
        (131_072, 5, 8, None),
    ):
        theta, seeds = torch.randn(numel), torch.tensor([1, -1, 5, 1, 2**40, 7, 8, 9])[:rows]
        scales = torch.tensor([0.1, -0.2, 0.0, 1e3, 1e-3, 1.0, -1.0, 2.0])[:rows]
        got = backend.perturb_rows(theta, seeds, scales, offset, distribution, configuration=configuration)
        assert torch.equal(bits(got), bits(native.perturb_rows(theta, seeds, scales, offset, distribution)))


def test_tables_that_travel_as_arguments():
    """How seeds and pointers reach the device while a CUDA graph is captured."""
    for table in (
        torch.tensor([-(2**63), 2**63 - 1, 0, -1]),
        torch.arange(17) << 40,
        torch.randn(3),
        torch.randn(2, 9),
        torch.empty(0, dtype=torch.int64),
    ):
        got = launch._through_launches(table, torch.device("cpu"))
        assert got.shape == table.shape and torch.equal(got, table)


@pytest.mark.parametrize(
    "op, args",
    [
        ("fill_normal_", lambda: (torch.zeros(9), -5, 2, "gaussian", "triton")),
        ("fill_normal_", lambda: (torch.zeros(9).bfloat16(), 5, 0, "rademacher", "triton")),
        (
            "perturb_",
            lambda: (
                [torch.ones(5), torch.ones(2, 3).half()],
                torch.tensor([3, -1]),
                torch.tensor([0.0, 0.5]),
                0,
                0.9,
                "gaussian",
                "triton",
            ),
        ),
    ],
    ids=["fill_normal_", "fill_normal_bf16", "perturb_"],
)
def test_opcheck(op, args):
    torch.library.opcheck(getattr(torch.ops.adazeta, op).default, args())


def test_one_graph_with_the_results_of_eager():
    def step(theta, seeds, scales):
        z = kernels.fill_normal_(torch.empty_like(theta), 2**63 + 5, offset=3, backend="triton")
        moved = theta.clone()
        kernels.perturb_([moved, z], seeds, scales, decay=0.5, backend="triton")
        return moved, z

    args = torch.randn(50), torch.tensor([3, -1]), torch.tensor([0.5, -1e-3])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*args), step(*args), strict=True):
        assert torch.equal(got, expected)


def test_bad_input_gives_the_errors_of_every_backend():
    theta = torch.zeros(4)
    for exception, match, call in (
        (TypeError, "has dtype float64", lambda: kernels.fill_normal_(theta.double(), 1, backend="triton")),
        (ValueError, "not contiguous", lambda: kernels.fill_normal_(torch.zeros(4, 4).T[:2], 1, backend="triton")),
        (ValueError, "share memory", lambda: kernels.perturb_([theta, theta], [1], [1.0], backend="triton")),
        (ValueError, "must be finite", lambda: kernels.perturb_([theta], [1], [torch.nan], backend="triton")),
        (ValueError, "2 seeds but 1 scales", lambda: kernels.perturb_([theta], [1, 2], [1.0], backend="triton")),
    ):
        with pytest.raises(exception, match=match):
            call()
    assert not theta.any()


def test_explain_names_triton():
    found = kernels.explain("perturb_", [torch.zeros(3)], [1], [1.0], backend="triton")
    assert found.backend == "triton" and not found.passed_over
    assert kernels.explain("fill_normal_", torch.zeros(3), 1).backend == "native"  # never the interpreter by itself
    assert kernels.backends()["triton"] is None
