"""derive_seed and derive_seeds; their test vectors are in test_spec.py."""

import numpy as np
import pytest

from adazeta_kernels import derive_seed, derive_seeds


def test_list_equals_single_calls():
    assert derive_seeds(42, 2**33 + 1, 20) == [derive_seed(42, 2**33 + 1, query) for query in range(20)]
    assert derive_seeds(0, 0, 0) == []


def test_seeds_of_nearby_arguments_are_distinct_and_use_all_bits():
    seeds = [s for run in range(4) for step in range(500) for s in derive_seeds(run, step, 20)]
    assert len(set(seeds)) == len(seeds) == 40_000
    ones = np.unpackbits(np.array(seeds, dtype=np.uint64).view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 4.5 * 0.5 / 200  # 4.5 standard errors


def test_high_bits_of_arguments_matter():
    base = derive_seed(1, 1, 1)
    assert base not in {derive_seed(1 + 2**63, 1, 1), derive_seed(1, 1 + 2**32, 1), derive_seed(1, 1, 1 + 2**31)}


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((-1, 0, 0), ValueError, r"run_seed must be in 0 <= run_seed < 2\*\*64, got -1"),
        ((2**64, 0, 0), ValueError, "run_seed"),
        ((0, 2**64, 0), ValueError, "step"),
        ((0, 0, 2**32), ValueError, r"query < 2\*\*32, got 4294967296"),
        ((0.0, 0, 0), TypeError, "run_seed must be an integer, got 0.0 of type float"),
        ((0, True, 0), TypeError, "step must be an integer"),
        ((0, 0, "1"), TypeError, "query must be an integer, got '1' of type str"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        derive_seed(*arguments)


def test_bad_count():
    with pytest.raises(ValueError, match="n must be"):
        derive_seeds(0, 0, -1)
    with pytest.raises(ValueError, match=r"at most 2\*\*32"):
        derive_seeds(0, 0, 2**32 + 1)
