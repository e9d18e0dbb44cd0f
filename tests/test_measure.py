"""Intervals of paired differences."""

import pytest
import torch
from scipy import stats

from lib.errors import UserError
from lib.measure import paired_interval


def test_a_constant_difference_has_no_spread():
    assert paired_interval(torch.full((3, 4, 5), 0.25)) == pytest.approx((0.25, 0.25, 0.25))


@pytest.mark.parametrize("count", [2, 5, 200])
def test_one_axis_is_students_interval(count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = stats.ttest_1samp(values.numpy(), 0).confidence_interval(0.95)
    mean, low, high = paired_interval(values)
    assert mean == pytest.approx(float(values.mean()))
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_a_single_difference_has_no_interval():
    with pytest.raises(UserError, match="no interval"):
        paired_interval(torch.ones(1, 1))


# (seeds, plans, examples), and how much each of them, and what is left, moves a difference.
@pytest.mark.parametrize(("shape", "moves", "rest"), [
    ((3, 50), (1, 0), 0.2), ((3, 50), (0, 1), 0.2), ((3, 50), (0.3, 1), 0.2),
    ((3, 6, 10), (1, 0, 0), 0.3), ((3, 26, 5), (0.3, 0.5, 0.2), 0.3), ((5,), (1,), 0),
    ((3, 50), (0, 0), 1)])
def test_the_interval_holds_the_truth_as_often_as_it_says(shape, moves, rest):
    """A bootstrap of the axes holds it in about three quarters of the first case."""
    draws = 1000
    # Three standard deviations of the count below; wider is allowed.
    assert coverage(shape, moves, rest, draws) > 0.95 - 3 * (0.05 * 0.95 / draws) ** 0.5


@pytest.mark.parametrize("examples", [1.3, 1.8])
def test_a_far_smaller_second_part_makes_it_a_little_too_narrow(examples):
    """Its many entries count among the degrees of freedom, though three seeds decide."""
    held = coverage((3, 50), (1, examples), 0.0, 4000)
    assert 0.915 < held < 0.94


def coverage(shape, moves, rest, draws):
    """Share of intervals that hold zero, the truth."""
    rng = torch.Generator().manual_seed(4)
    values = rest * torch.randn((draws, *shape), generator=rng)
    for axis, (count, move) in enumerate(zip(shape, moves, strict=True)):
        along = [count if other == axis else 1 for other in range(len(shape))]
        values = values + move * torch.randn((draws, *along), generator=rng)
    return sum(low <= 0 <= high for _, low, high in map(paired_interval, values)) / draws


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_is_shared_along_an_axis_is_not_averaged_away(axis):
    shape = [1, 1, 1]
    shape[axis] = 12
    own = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    alone, spread = paired_interval(own.flatten()), paired_interval(own.expand(12, 12, 12))
    # 1,728 numbers, but only 12 that differ: the interval must stay as wide.
    assert spread[2] - spread[1] == pytest.approx(alone[2] - alone[1], rel=0.05)
