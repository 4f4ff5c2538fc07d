"""fill_normal_: native and reference write the same bits, whatever the offset, size, dtype, level or threads."""

import pytest
import torch
from kernel_cases import DISTRIBUTIONS, DTYPES, bits

from adazeta_kernels import fill_normal_
from adazeta_kernels.backends import native
from adazeta_kernels.backends.reference import rng

LEVELS = native.levels()
# Around blocks (4 and 128 elements), groups (64), tiles (2048) and the carry into the high counter word.
OFFSETS = [0, 1, 2, 3, 63, 127, 2047, 2**32 - 5, 2**34 - 3, 2**39 - 70, 2**63 - 5000]


def expected(numel, seed, offset, distribution, dtype=torch.float32):
    out = torch.full((numel,), torch.nan, dtype=dtype)
    rng.fill_normal_(out, seed, offset, distribution)
    return bits(out)


@pytest.fixture
def threads():
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_levels_end_with_default():
    """The levels that the other tests force; "default" runs on any processor."""
    assert LEVELS[-1] == "default"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_equals_reference(dtype, distribution, level):
    for offset in OFFSETS:
        for numel in (1, 5, 64, 4999):
            out = torch.full((numel + 2,), 3.0, dtype=dtype)
            native.fill_normal_(out[1:-1], 2**64 - 3, offset, distribution, level=level)
            assert torch.equal(bits(out[1:-1]), expected(numel, 2**64 - 3, offset, distribution, dtype)), (
                offset,
                numel,
            )
            assert out[0] == out[-1] == 3, "wrote outside the tensor"


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_million_elements(distribution):
    out = fill_normal_(torch.empty(1_000_003), 11, offset=2**34 - 500_001, distribution=distribution, backend="native")
    assert torch.equal(bits(out), expected(1_000_003, 11, 2**34 - 500_001, distribution))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_any_number_of_threads(threads, distribution):
    outs = []
    for count in (1, 2, 3, 5):
        threads(count)
        outs.append(fill_normal_(torch.empty(200_003), 5, offset=77, distribution=distribution, backend="native"))
    assert all(torch.equal(bits(out), bits(outs[0])) for out in outs)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_offset_continues_the_direction(backend, distribution):
    whole = fill_normal_(torch.empty(3, 1000), 9, offset=6, distribution=distribution, backend=backend)
    parts = [
        fill_normal_(torch.empty(n), 9, offset=6 + begin, distribution=distribution, backend=backend)
        for begin, n in ((0, 1), (1, 129), (130, 2000), (2130, 870))
    ]
    assert torch.equal(whole.flatten(), torch.cat(parts))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_empty_tensor_and_high_dimensions(backend):
    assert fill_normal_(torch.empty(0, 4), 1, offset=2**63 - 1, backend=backend).shape == (0, 4)
    out = fill_normal_(torch.empty(2, 3, 5), 1, backend=backend)
    assert torch.equal(out.flatten(), fill_normal_(torch.empty(30), 1, backend=backend))
    assert fill_normal_(torch.empty(()), 1, backend=backend) == out[0, 0, 0]


def test_half_precision_is_the_float32_direction_rounded():
    plain = fill_normal_(torch.empty(100_000), 4, backend="native")
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(fill_normal_(torch.empty(100_000, dtype=dtype), 4, backend="native"), plain.to(dtype))


def test_seeds_and_streams_differ():
    first = [fill_normal_(torch.empty(64), seed) for seed in (0, 1, 2**32, 2**63, 2**64 - 1)]
    for i, one in enumerate(first):
        assert all((one == other).sum() < 3 for other in first[:i])


def test_unknown_level_is_named():
    with pytest.raises(ValueError, match="'v9' is not built or this CPU cannot run it"):
        native.fill_normal_(torch.empty(3), 1, 0, "gaussian", level="v9")
