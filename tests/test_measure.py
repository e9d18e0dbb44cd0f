"""Intervals of paired differences."""

import pytest
import torch

from lib.measure import paired_interval


def test_a_constant_difference_has_no_spread():
    assert paired_interval(torch.full((3, 4, 5), 0.25)) == pytest.approx((0.25, 0.25, 0.25))


def test_one_axis_agrees_with_the_normal_interval():
    values = torch.randn(200, generator=torch.Generator().manual_seed(1))
    mean, low, high = paired_interval(values)
    half = 1.96 * float(values.std()) / 200 ** 0.5
    assert mean == pytest.approx(float(values.mean()))
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_is_shared_along_an_axis_is_not_averaged_away(axis):
    shape = [1, 1, 1]
    shape[axis] = 12
    own = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    alone, spread = paired_interval(own.flatten()), paired_interval(own.expand(12, 12, 12))
    # 1,728 numbers, but only 12 that differ: the interval must stay as wide.
    assert spread[2] - spread[1] == pytest.approx(alone[2] - alone[1], rel=0.05)


def test_the_same_seed_gives_the_same_interval():
    values = torch.randn(3, 7, generator=torch.Generator().manual_seed(3))
    assert paired_interval(values) == paired_interval(values)
    assert paired_interval(values) != paired_interval(values, seed=1)
