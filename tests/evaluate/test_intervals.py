"""lib.evaluate.scores: shares and paired differences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lib.errors import UserError
from lib.evaluate.scores import paired_interval, wilson


@given(st.integers(1, 1000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(case):
    hits, total = case
    expected = stats.binomtest(hits, total).proportion_ci(0.95, method="wilson")
    assert wilson(hits, total) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_too_little_for_an_interval():
    with pytest.raises(UserError, match="at least one"):
        wilson(0, 0)
    with pytest.raises(UserError, match="no interval"):
        paired_interval(torch.ones(1, 1))


def test_a_constant_difference_has_no_spread():
    assert paired_interval(torch.full((3, 4, 5), 0.25)) == pytest.approx((0.25, 0.25, 0.25))


@pytest.mark.parametrize("count", [2, 5, 200])
def test_one_axis_is_students_interval(count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = stats.ttest_1samp(values.numpy(), 0).confidence_interval(0.95)
    mean, low, high = paired_interval(values)
    assert mean == pytest.approx(float(values.mean()))
    assert (low, high) == pytest.approx((expected.low, expected.high))


# Shape (seeds, configurations, examples), by how much each of them moves a difference,
# the rest, and how often the interval must cover the truth.
@pytest.mark.parametrize(("shape", "moves", "rest", "least"), [
    ((3, 50), (1, 0), 0.2, 0.95), ((3, 50), (0, 1), 0.2, 0.95), ((3, 50), (0.3, 1), 0.2, 0.95),
    ((3, 6, 10), (1, 0, 0), 0.3, 0.95), ((3, 26, 5), (0.3, 0.5, 0.2), 0.3, 0.95),
    ((5,), (1,), 0, 0.95), ((3, 50), (0, 0), 1, 0.95),
    # A far smaller second part makes it a little too narrow: its many entries count among
    # the degrees of freedom, though three seeds decide.
    ((3, 50), (1, 1.3), 0, 0.925), ((3, 50), (1, 1.8), 0, 0.925)])
def test_the_interval_covers_the_truth_as_often_as_it_says(shape, moves, rest, least):
    """A bootstrap of the axes covers it in about three quarters of the first case."""
    draws, rng = 1000, torch.Generator().manual_seed(4)
    values = rest * torch.randn((draws, *shape), generator=rng)
    for axis, (count, move) in enumerate(zip(shape, moves, strict=True)):
        along = [count if other == axis else 1 for other in range(len(shape))]
        values = values + move * torch.randn((draws, *along), generator=rng)
    covered = sum(low <= 0 <= high for _, low, high in map(paired_interval, values)) / draws
    # Three standard deviations of the count; a wider interval is allowed.
    assert covered > least - 3 * (least * (1 - least) / draws) ** 0.5


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_is_shared_along_an_axis_is_not_averaged_away(axis):
    shape = [1, 1, 1]
    shape[axis] = 12
    own = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    alone, spread = paired_interval(own.flatten()), paired_interval(own.expand(12, 12, 12))
    # 1,728 numbers, but only 12 that differ: the interval must stay as wide.
    assert spread[2] - spread[1] == pytest.approx(alone[2] - alone[1], rel=0.05)
