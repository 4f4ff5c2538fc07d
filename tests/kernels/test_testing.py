"""The test helpers can fail: wrong, unwritten and mis-shaped results are caught, right ones pass."""

import pytest
import torch

from adazeta_kernels import TTAdapterLayout, fill_normal_
from adazeta_kernels.testing import assert_as_exact_as, dense_adapter, moment_deviations, poisoned_memory


def test_tolerance_is_twice_the_error_of_plain_torch():
    oracle = torch.randn(100, dtype=torch.float64)
    plain = oracle.bfloat16()
    error = (plain.double() - oracle).abs().max()
    assert_as_exact_as(plain, plain, oracle)
    worse = oracle.clone()
    worse[3] += 3 * error
    with pytest.raises(AssertionError, match=r"error .* against float64, plain torch .*, allowed"):
        assert_as_exact_as(worse.bfloat16(), plain, oracle)
    with pytest.raises(AssertionError, match="error 1.0"):
        assert_as_exact_as((oracle + 1e-6).float() + 1, oracle.float(), oracle)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_element_that_is_not_finite_fails(bad):
    oracle = torch.randn(100, dtype=torch.float64)
    actual = oracle.float()
    actual[99] = bad
    with pytest.raises(AssertionError, match="against float64"):
        assert_as_exact_as(actual, oracle.float(), oracle)


def test_another_shape_or_dtype_fails():
    oracle = torch.randn(2, 3, dtype=torch.float64)
    for actual in (oracle.float()[0], oracle.float()[None], oracle.half()):
        with pytest.raises(AssertionError, match="expected torch.float32"):
            assert_as_exact_as(actual, oracle.float(), oracle)


def test_memory_is_poisoned_and_the_mode_is_put_back():
    with poisoned_memory():
        assert torch.empty(3).isnan().all() and torch.ones(3).new_empty(2).isnan().all()
        assert torch.empty_like(torch.ones(2).bfloat16()).isnan().all()
    torch.use_deterministic_algorithms(False)
    with pytest.raises(KeyError), poisoned_memory():
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


def test_this_suite_runs_with_poisoned_memory():
    assert torch.empty(5).isnan().all()


def test_moments_tell_normal_draws_from_others():
    z = fill_normal_(torch.empty(1_000_000), 11)
    assert max(map(abs, moment_deviations(z))) < 5
    assert abs(moment_deviations(z + 0.01)[0]) > 5
    assert abs(moment_deviations(z * 1.01)[1]) > 5
    assert abs(moment_deviations(torch.rand(1_000_000) * 12**0.5 - 3**0.5)[3]) > 5


def test_dense_adapter_on_an_example_worked_by_hand():
    layout = TTAdapterLayout.auto(4, 4, 1, shapes={"width": (2, 2), "bottleneck": (2, 2)})
    theta = torch.ones(layout.numel)
    for segment in layout.segments():
        if segment.name == "down.bias":
            theta[segment.offset : segment.offset + 4] = torch.tensor([0.0, -100.0, 1.0, 0.0])
    # All cores one: down sums x into every place, 1+2+3+4 = 10; relu([10, -90, 11, 10]) sums to 31, plus bias 1.
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert torch.equal(dense_adapter(x, theta, layout, "relu", 0.5), x.double() + 0.5 * 32)
