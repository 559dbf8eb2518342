"""Intervals over seeds against tables of Student's t."""

import math

import pytest

from dla_train.intervals import interval, t_quantile


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.706), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (29, 2.0452), (255, 1.9693), (10**6, 1.95996)],
)
def test_quantiles_are_those_of_the_tables(degrees, expected):
    assert t_quantile(0.975, degrees) == pytest.approx(expected, rel=2e-3)
    assert t_quantile(0.5, degrees) == pytest.approx(0, abs=1e-12)


def test_quantiles_of_99_per_cent_too():
    assert t_quantile(0.995, 9) == pytest.approx(3.2498, rel=2e-3)
    assert t_quantile(0.995, 2) == pytest.approx(9.9248, rel=1e-4)


def test_an_interval_is_students():
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.seeds == 3
    half = 4.3027 / 3**0.5
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=1e-4)


def test_one_seed_has_a_mean_and_no_interval():
    found = interval([1.5])
    assert found.mean == 1.5 and math.isnan(found.low) and math.isnan(found.high)
    assert not found.clear_of(interval([0.0, 0.1]))
