"""TT shapes: the paper's, any other width, limits and errors, and the round trip through integers."""

from math import prod

import pytest
import torch

from adazeta_kernels import TTAdapterLayout, TTShape
from adazeta_kernels.factorization import balanced_factors

WIDTHS = {
    576: (8, 8, 9),
    768: (8, 8, 12),
    896: (8, 8, 14),
    1024: (8, 8, 16),
    2560: (10, 16, 16),
    3072: (12, 16, 16),
    4096: (16, 16, 16),
    5120: (16, 16, 20),
    11008: (16, 16, 43),
}


@pytest.mark.parametrize("width", WIDTHS)
def test_balanced_factors(width):
    assert balanced_factors(width) == WIDTHS[width]
    layout = TTAdapterLayout.auto(width)
    assert (layout.down.d_in, layout.down.d_out) == (width, 64) == (layout.up.d_out, layout.up.d_in)
    assert layout.up == layout.down.mirror


def test_no_three_factors_have_a_smaller_sum():
    for size in range(8, 700):
        triples = [(a, b, size // (a * b)) for a in range(2, 9) for b in range(a, 27) if size % (a * b) == 0]
        triples = [t for t in triples if t[2] >= t[1]]
        if triples and max(min(triples, key=sum)) <= 64:
            assert sum(balanced_factors(size)) == min(map(sum, triples)), size


def test_paper_shape_has_1100_numbers():
    shape = TTShape.auto(4096, 64, 5)
    assert str(shape) == "[16, 16, 16 | 4, 4, 4] ranks (5, 5, 5, 5, 5)"
    assert [prod(core) for core in shape.core_shapes] == [80, 400, 400, 100, 100, 20]
    assert shape.numel == 1100 == shape.mirror.numel
    assert shape.bond == 5


def test_paper_total_on_llama_2_7b():
    layout = TTAdapterLayout.auto(4096, 64, 5)
    sites = 3 * 32  # gate, up and down of 32 blocks, all 4096 wide
    biases = sum(s.numel for s in layout.segments() if s.is_bias)
    assert sites * layout.numel == 610_560
    assert round(100 * biases / layout.numel) == 65


def test_segments_tile_theta_in_order():
    layout = TTAdapterLayout.auto(576, 64, 5)
    names = [s.name for s in layout.segments()]
    assert names == [f"down.{k}" for k in range(6)] + ["down.bias"] + [f"up.{k}" for k in range(6)] + ["up.bias"]
    assert [s.name for s in layout.segments() if s.is_bias] == ["down.bias", "up.bias"]
    ends = [s.offset + s.numel for s in layout.segments()]
    assert [s.offset for s in layout.segments()] == [0, *ends[:-1]]
    assert ends[-1] == layout.numel == 2 * 10 * 67 + 10 + 640  # the sum of cores worked out by hand: 685 + 665


def test_without_biases():
    layout = TTAdapterLayout.auto(576, 64, 5, bias=False)
    assert layout.numel == 685 + 665
    assert layout.factor_numel == 2 * (576 * 5 + 5 * 64)
    l1, r1, b1, l2, r2, b2 = layout.split_factors(torch.zeros(2, layout.factor_numel))
    assert b1 is None and b2 is None
    assert [tuple(t.shape) for t in (l1, r1, l2, r2)] == [(2, 576, 5), (2, 5, 64), (2, 64, 5), (2, 5, 576)]


def test_split_factors_gives_views_that_tile():
    layout = TTAdapterLayout.auto(24, 8, (2, 3, 4, 3, 2))
    factors = torch.arange(3.0 * layout.factor_numel).reshape(3, -1)
    parts = layout.split_factors(factors)
    shapes = [(3, 24, 4), (3, 4, 8), (3, 8), (3, 8, 4), (3, 4, 24), (3, 24)]
    assert [tuple(t.shape) for t in parts] == shapes
    assert torch.equal(torch.cat([t.flatten(1) for t in parts], 1), factors)
    parts[5].fill_(-1)
    assert (factors[:, -24:] == -1).all()
    r2b = layout.split_augmented(factors)[3]
    assert tuple(r2b.shape) == (3, 5, 24) and (r2b[:, -1] == -1).all()


def test_ranks_per_bond():
    layout = TTAdapterLayout.auto(576, 64, (2, 3, 4, 3, 2))
    assert layout.down.ranks == (2, 3, 4, 3, 2) == layout.up.ranks[::-1]
    assert layout.down.core_shapes[2:4] == ((3, 9, 4), (4, 4, 3))
    with pytest.raises(ValueError, match=r"rank 5 of bond 4 is above its limit 4"):
        TTAdapterLayout.auto(4096, 64, (5, 5, 5, 5, 5))
    with pytest.raises(ValueError, match=r"ranks has 3 entries, expected 5"):
        TTAdapterLayout.auto(576, 64, (2, 2, 2))


@pytest.mark.parametrize("shapes", ["auto", {"width": (24, 24)}, {"bottleneck": (64,)}, {"width": (2, 288)}])
@pytest.mark.parametrize("bias", [True, False])
def test_encode_round_trip(shapes, bias):
    layout = TTAdapterLayout.auto(576, 64, 3, shapes=shapes, bias=bias)
    code = layout.encode()
    assert all(type(number) is int for number in code)
    again = TTAdapterLayout.decode(code)
    assert again == layout and hash(again) == hash(layout) and again.segments() == layout.segments()


def test_decode_rejects_what_encode_did_not_write():
    code = TTAdapterLayout.auto(576).encode()
    for bad in ([], code[:-1], [*code, 1], [9, *code[1:]], [code[0], 577, *code[2:]]):
        with pytest.raises(ValueError, match="not an encoded TTAdapterLayout"):
            TTAdapterLayout.decode(bad)


def test_describe_counts():
    text = TTAdapterLayout.auto(4096).describe()
    assert "6,360 numbers, 4,160 (65 %) of them biases" in text
    assert "[16, 16, 16 | 4, 4, 4]" in text and "1,100 numbers for 262,144" in text
    assert "no biases" in TTAdapterLayout.auto(4096, bias=False).describe()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TTAdapterLayout.auto(4099), ValueError, r"width 4099 is prime: .*shapes=\{'width': \(4099,\)\}"),
        (lambda: TTAdapterLayout.auto(2018), ValueError, r"width 2018 is nearly prime \(largest factor 1009\)"),
        (lambda: TTAdapterLayout.auto(576, 61), ValueError, r"bottleneck 61 is prime: use a bottleneck of 60 or 62"),
        (lambda: TTAdapterLayout.auto(576, 3), ValueError, r"bottleneck 3 is too small"),
        (lambda: TTAdapterLayout.auto(576, 64, 65), ValueError, r"rank 65 is above min\(d_in, d_out\) = 64"),
        (lambda: TTAdapterLayout.auto(576, 64, 0), ValueError, r"rank must be at least 1, got 0"),
        (lambda: TTAdapterLayout.auto(576, 64, 2.5), TypeError, r"rank must be an integer or one .* got 2.5"),
        (lambda: TTAdapterLayout.auto(576, 64, True), TypeError, r"rank must be .* got True"),
        (lambda: TTAdapterLayout.auto(576.0), TypeError, r"width must be an integer, got 576.0"),
        (lambda: TTAdapterLayout.auto(576, shapes={"width": (8, 8)}), ValueError, r"multiplies to 64, expected width"),
        (lambda: TTAdapterLayout.auto(576, shapes={"up": (8, 8)}), ValueError, r"unknown keys in shapes: \['up'\]"),
        (lambda: TTAdapterLayout.auto(576, shapes="paper"), TypeError, r"shapes must be \"auto\" or a dict"),
        (lambda: TTShape((8, 0), (4,), (2, 2)), ValueError, r"in_factors must hold integers of at least 1"),
        (lambda: TTAdapterLayout(8, 4, TTShape.auto(8, 4, 1), TTShape.auto(8, 4, 1)), ValueError, r"up 4 x 8"),
    ],
)
def test_bad_shapes_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_prime_width_works_as_the_error_advises():
    layout = TTAdapterLayout.auto(4099, shapes={"width": (4099,)})
    assert layout.down.core_shapes[0] == (1, 4099, 5)
