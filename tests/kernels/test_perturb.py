"""perturb_ and perturb_rows: the bits of the reference, for any list, dtype, offset, level, threads and split."""

from types import SimpleNamespace

import pytest
import torch
from kernel_cases import DISTRIBUTIONS, DTYPES, bits, same

from adazeta_kernels import fill_normal_, perturb_
from adazeta_kernels.backends import native
from adazeta_kernels.backends.reference import rng

LEVELS = native.levels()
SHAPES = [(3,), (0,), (17, 5), (1,), (2048,), (63, 33), (2, 0, 3), (700,)]


def tensors(dtypes, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtypes[i % len(dtypes)]) for i, s in enumerate(shapes)]


def run(module, params, seeds, scales, offset=0, decay=1.0, distribution="gaussian", **kwargs):
    params = [p.clone() for p in params]
    seeds = torch.tensor([s - 2**64 if s >= 2**63 else s for s in seeds], dtype=torch.int64)
    module.perturb_(params, seeds, torch.tensor(scales), offset, decay, distribution, **kwargs)
    return params


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtypes", [[d] for d in DTYPES] + [DTYPES], ids=["float32", "bfloat16", "float16", "mixed"])
def test_native_equals_reference(dtypes, distribution, level):
    params = tensors(dtypes)
    for offset, decay, seeds, scales in (
        (0, 1.0, [3], [1e-3]),
        (2**34 - 1500, 0.9, [2**64 - 1, 0, 3], [0.5, -2.0, 1e-3]),
        (2**32 + 65, 0.99999, [7] * 5, [0.25, 0.0, -0.5, 3e-5, 1e4]),
        (1, -0.0, [1, 2], [0.0, 1.0]),
        (129, 1.0, [], []),
        (129, 0.5, [], []),
    ):
        got = run(native, params, seeds, scales, offset, decay, distribution, level=level)
        want = run(rng, params, seeds, scales, offset, decay, distribution)
        assert all(same(g, w) for g, w in zip(got, want)), (offset, decay, seeds)
        assert [g.dtype for g in got] == [p.dtype for p in params]


def test_definition_in_float64():
    """Against the formula in float64, sharing nothing but the direction."""
    theta, seeds, scales = torch.randn(5000), [5, 6, 7], [0.3, -0.2, 0.7]
    want = 0.75 * theta.double()
    for seed, scale in zip(seeds, scales):
        want += torch.tensor(scale).double() * fill_normal_(torch.empty(5000), seed, offset=10).double()
    perturb_([theta], seeds, scales, offset=10, decay=0.75)
    assert (theta - want).abs().max() < 4e-7 * want.abs().max()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_list_is_its_concatenation(distribution):
    whole = torch.randn(10_007)
    pieces = [p.clone() for p in whole.split([1, 63, 64, 2047, 4000, 0, 3832])]
    perturb_([whole], [1, 2], [0.1, 0.2], offset=2**32 - 50, distribution=distribution, backend="native")
    perturb_(pieces, [1, 2], [0.1, 0.2], offset=2**32 - 50, distribution=distribution, backend="native")
    assert torch.equal(torch.cat(pieces), whole)


def test_a_thousand_small_tensors():
    sizes = torch.randint(1, 200, (1000,)).tolist()
    whole = torch.randn(sum(sizes))
    pieces = [p.clone() for p in whole.split(sizes)]
    perturb_([whole], [1], [0.1], backend="native")
    perturb_(pieces, [1], [0.1], backend="native")
    assert torch.equal(torch.cat(pieces), whole)


def test_tensors_are_read_by_native_code_or_python(monkeypatch):
    """The same bits whichever way addresses reach the kernel."""
    params = [torch.nn.Parameter(t, requires_grad=False) for t in tensors(DTYPES)]
    params.append(torch.randn(9, 1, 4)[2:5])  # a view that starts inside its storage
    results = []
    for exchange in (native._EXCHANGE, None):
        monkeypatch.setattr(native, "_EXCHANGE", exchange)
        copies = [p.clone() for p in params]
        assert (native.read_tensors(copies).native is None) == (exchange is None)
        perturb_(copies, [5, 6], [1e-2, -2e-2], offset=11, backend="native")
        results.append(copies)
    assert all(map(same, *results))


class Subclass(torch.Tensor):
    pass


def freed(begin=3):
    tensor = torch.zeros(begin + 5)[begin:]
    tensor.untyped_storage().resize_(0)
    return tensor


UNFIT = {
    "float64": lambda first: torch.zeros(3, dtype=torch.float64),
    "integer": lambda first: torch.zeros(3, dtype=torch.int32),
    "strided": lambda first: torch.zeros(4, 4)[:, 1],
    "sparse": lambda first: torch.eye(3).to_sparse(),
    "meta": lambda first: torch.zeros(3, device="meta"),
    "overlapping": lambda first: first[1:],
    "freed": lambda first: freed(),
    "freed, deep in its storage": lambda first: freed(begin=2**20),
    "subclass": lambda first: torch.zeros(3).as_subclass(Subclass),
    "no tensor": lambda first: [1.0, 2.0],
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_is_not_plain_is_left_to_python(kind):
    first = torch.zeros(10)
    assert native.read_tensors([first]).native is not None
    assert native.read_tensors([first, UNFIT[kind](first)]).native is None


def test_a_list_is_read_once_where_it_is_not_plain_too(monkeypatch):
    lists = []
    read = native._native.read_tensors
    monkeypatch.setattr(native, "_native", SimpleNamespace(read_tensors=lambda *a: lists.append(a) or read(*a)))
    with pytest.raises(ValueError, match="tensor 1 of shape .4,. is not contiguous"):
        perturb_([torch.zeros(10), UNFIT["strided"](None)], [1], [0.1])
    assert len(lists) == 1


def test_any_number_of_threads():
    before = torch.get_num_threads()
    params = tensors(DTYPES, shapes=[(100_001,), (3,), (70_000,)])
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(run(native, params, [4, 5], [0.1, 0.2], 13, 0.5))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(same(one, other) for one, other in zip(result, results[0]))


def test_a_scale_that_is_a_negated_view():
    """Such a view says in a bit, and not in its memory, that its numbers have the other sign."""
    scale = torch.tensor([0.5 + 2j]).conj().imag
    assert scale.is_neg() and scale.is_contiguous()
    got, want = torch.zeros(9), torch.zeros(9)
    perturb_([got], [1], scale)
    perturb_([want], [1], [-2.0])
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_negated_view_is_refused(backend):
    """Of one number it is contiguous; before, it was perturbed the wrong way round."""
    numbers = torch.tensor([0.5 + 2j])
    negated, beside = numbers.conj().imag, torch.zeros(9)
    for params in ([negated], [beside, negated], [negated, beside]):
        with pytest.raises(ValueError, match="perturb_: .* is a negated view"):
            perturb_(params, [1], [1.0], backend=backend)
    with pytest.raises(ValueError, match="fill_normal_: .* is a negated view"):
        fill_normal_(negated, 1, backend=backend)
    assert torch.equal(numbers, torch.tensor([0.5 + 2j])) and not beside.any()


def test_scales_that_lie_in_theta():
    theta = torch.randn(10_000)
    want = theta.clone()
    perturb_([want], [1, 2], want[5000:5002].clone())
    perturb_([theta], [1, 2], theta[5000:5002], backend="native")
    assert torch.equal(theta, want)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_indices_beyond_2_to_the_32(backend, distribution):
    """What is added at an index depends on all 63 bits of it, and a list runs across the carry without a seam."""
    seen = []
    for offset in (5, 2**32 + 5, 2**34 + 5, 2**39 + 5, 2**62 + 5):
        theta = torch.zeros(256)
        perturb_([theta], [8], [1.0], offset=offset, distribution=distribution, backend=backend)
        plain = fill_normal_(torch.empty(256), 8, offset=offset, distribution=distribution, backend="reference")
        assert torch.equal(theta, plain)
        assert all((theta - other).abs().max() > 0.5 for other in seen)
        seen.append(theta)
    parts = [torch.zeros(200), torch.zeros(300)]
    edge = 2**39 - 200  # block 2^32 of Rademacher, 2^37 of Gaussian, begins with the second tensor
    perturb_(parts, [8], [1.0], offset=edge, distribution=distribution, backend=backend)
    for part, begin in zip(parts, (edge, 2**39)):
        assert torch.equal(part, fill_normal_(torch.empty(len(part)), 8, offset=begin, distribution=distribution))


def test_one_pass_over_seeds_equals_one_call_each_in_float32():
    """The running sum is a float32, so for a float32 theta passes can be joined or split at will."""
    theta = torch.randn(3000)
    apart = theta.clone()
    for seed, scale in ((1, 0.1), (2, -0.7), (1, -0.1)):
        perturb_([apart], [seed], [scale])
    perturb_([theta], [1, 2, 1], [0.1, -0.7, -0.1])
    assert torch.equal(theta, apart)


def test_scale_zero_leaves_every_bit():
    theta = torch.tensor([-0.0, 0.0, 1e-45, -1e-45, torch.inf, 3.0])
    for backend in ("native", "reference"):
        copy = theta.clone()
        perturb_([copy], [1], [0.0], backend=backend)
        assert torch.equal(bits(copy), bits(theta))


@pytest.mark.parametrize("level", LEVELS)
def test_every_half_precision_number_survives(level):
    """Widened and rounded back, with nothing added: all 2^16 patterns, subnormals, infinities and NaN among them."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        assert same(run(native, [every], [], [], level=level)[0], every)
        # And that what was widened is the number itself: doubling must give what torch gives.
        assert same(run(native, [every], [], [], decay=2.0, level=level)[0], every.float().mul(2).to(dtype))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_half_precision(dtype, level):
    """Ties, subnormals, overflow: sums of a half-precision theta and a direction, rounded by torch from float32."""
    exponents = torch.arange(-26, 18).double()
    theta = (2.0**exponents)[:, None].mul(1 + torch.rand(44, 500, dtype=torch.float64)).to(dtype).flatten()
    for scale in (2.0**-25, 2.0**-15, 1.0, 6e4):
        plain = theta.float()
        want = run(rng, [plain], [5], [scale])[0].to(dtype)
        assert same(run(native, [theta], [5], [scale], level=level)[0], want)
    # Rademacher with theta = 1 puts scales exactly on ties and next to them.
    unit = torch.finfo(dtype).eps
    for scale in (unit / 2, unit / 2 * (1 + 2**-20), unit / 4, unit * 1.5):
        ones = torch.ones(4096, dtype=dtype)
        want = run(rng, [ones.float()], [5], [scale], distribution="rademacher")[0].to(dtype)
        assert same(run(native, [ones], [5], [scale], distribution="rademacher", level=level)[0], want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_theta_stays_so(dtype):
    theta = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0] * 50, dtype=dtype)
    got = run(native, [theta], [1, 2], [0.5, 0.25], decay=0.5)[0]
    assert same(got, run(rng, [theta], [1, 2], [0.5, 0.25], decay=0.5)[0])
    assert torch.equal(got.isnan(), theta.isnan())
    assert torch.equal(got.isinf(), theta.isinf())


def test_overflow_gives_infinity():
    for dtype in DTYPES:
        theta = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)
        got = run(native, [theta], [1], [torch.finfo(dtype).max / 2], distribution="rademacher")[0]
        assert same(got, run(rng, [theta], [1], [torch.finfo(dtype).max / 2], distribution="rademacher")[0])
        assert got.isinf().any()
        assert not got.isinf().all()


def test_subnormals_are_kept_when_torch_flushes_them():
    # Everything is made beforehand: torch itself would flush these numbers.
    want, got = torch.full((256,), 1e-40), torch.full((256,), 1e-40)
    seeds, scales = torch.tensor([1]), torch.tensor([1e-41])
    native.perturb_([want], seeds, scales, 0, 1.0, "gaussian")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no flush-to-zero mode")
    try:
        native.perturb_([got], seeds, scales, 0, 1.0, "gaussian")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits(got), bits(want))
    assert bits(want).unique().numel() > 200


def test_restore_drifts_only_by_rounding():
    """1000 cycles of +eps, -2 eps, +eps in float32, as in-place training does them."""
    theta = torch.randn(10_000)
    start = theta.clone()
    for step in range(1000):
        for scale in (1e-3, -2e-3, 1e-3):
            perturb_([theta], [step], [scale], backend="native")
    assert (theta - start).norm() / start.norm() < 1e-5


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_rows_equal_perturb(distribution, level):
    for n, offset in ((1, 0), (4097, 2**34 - 100), (5000, 3), (0, 0)):
        theta = torch.randn(n)
        seeds, scales = torch.tensor([1, -1, 5, 1]), torch.tensor([0.1, -0.2, 0.0, 1e3])
        rows = native.perturb_rows(theta, seeds, scales, offset, distribution, level=level)
        assert rows.shape == (4, n)
        assert torch.equal(rows, rng.perturb_rows(theta, seeds, scales, offset, distribution))
        for row, seed, scale in zip(rows, seeds.tolist(), scales.tolist()):
            moved = theta.clone()
            perturb_([moved], [seed % 2**64], [scale], offset=offset, distribution=distribution)
            assert torch.equal(row, moved)


def test_rows_on_many_threads():
    before = torch.get_num_threads()
    theta, seeds, scales = torch.randn(50_001), torch.arange(7), torch.linspace(-1, 1, 7)
    try:
        torch.set_num_threads(1)
        one = native.perturb_rows(theta, seeds, scales, 5, "gaussian")
        torch.set_num_threads(3)
        three = native.perturb_rows(theta, seeds, scales, 5, "gaussian")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, three)
