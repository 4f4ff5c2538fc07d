"""Query schedules, against the paper's formula."""

import pytest

from adazeta.schedule import AdaptiveQueries, ConstantQueries, as_schedule


def test_paper_schedule_on_llama():
    schedule = AdaptiveQueries(alpha=0.85, beta=0.45, maximum=20)
    # floor(.85 e^.45), at least 1, for epochs 0, 1, 5, 10, 100, 1000, 10000
    expected = {0: 1, 1: 1, 5: 1, 10: 2, 100: 6, 1000: 19, 10000: 20}
    assert {e: schedule(e * 7, steps_per_epoch=7) for e in expected} == expected
    assert schedule(7 * 11 - 1, steps_per_epoch=7) == schedule(70, steps_per_epoch=7)


def test_by_step_ignores_the_epoch():
    assert AdaptiveQueries(alpha=1, beta=1, maximum=9, by="step")(5, steps_per_epoch=100) == 5


def test_constant():
    assert as_schedule(3)(10**6, 17) == 3 and as_schedule(3) == ConstantQueries(3)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: ConstantQueries(0), ValueError, "at least 1"),
        (lambda: AdaptiveQueries(maximum=0), ValueError, "maximum >= 1"),
        (lambda: AdaptiveQueries(by="batch"), ValueError, "'epoch' or 'step'"),
        (lambda: AdaptiveQueries()(1, 0), ValueError, "steps_per_epoch"),
        (lambda: as_schedule("many"), TypeError, "integer or a schedule"),
        (lambda: as_schedule(True), TypeError, "integer or a schedule"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()
