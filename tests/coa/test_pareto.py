"""Fronts, hypervolume and its expected improvement, against a library."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pymoo.indicators.hv import HV
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from lib.coa.pareto import (
    SEGMENTS,
    expected_improvement,
    front,
    front_by_segment,
    hypervolume,
    non_dominated,
    segment,
)

REFERENCE = torch.tensor([8.6, 12.0], dtype=torch.float64)
# Whole quarters, so that ties in one objective or both are common.
POINTS = st.lists(st.tuples(st.integers(8, 34), st.integers(0, 47)), min_size=1, max_size=25
                  ).map(lambda rows: torch.tensor(rows, dtype=torch.float64) / 4)


@given(POINTS)
def test_hypervolume_agrees_with_pymoo(points):
    expected = HV(ref_point=REFERENCE.numpy())(points.numpy())
    assert hypervolume(points, REFERENCE) == pytest.approx(expected, abs=1e-9)


@given(POINTS)
def test_non_dominated_agrees_with_pymoo(points):
    expected = NonDominatedSorting().do(points.numpy(), only_non_dominated_front=True)
    assert non_dominated(points).nonzero().flatten().tolist() == sorted(expected.tolist())


@given(POINTS)
def test_a_front_descends(points):
    steps = front(points).diff(dim=0)
    assert bool((steps[:, 0] > 0).all()) and bool((steps[:, 1] < 0).all())


@given(POINTS)
def test_a_dominating_point_strictly_raises_the_hypervolume(points):
    # The reference (0, 0) of the released code gives 0 for every set.
    better = torch.cat([points, points.amin(0, keepdim=True) - 0.25])
    assert hypervolume(better, REFERENCE) > hypervolume(points, REFERENCE)


def test_points_beyond_the_reference_add_nothing():
    assert hypervolume(torch.tensor([[9.0, 1.0], [3.0, 12.5]]), REFERENCE) == 0
    one = torch.tensor([[3.0, 2.0]])
    assert hypervolume(one, REFERENCE) == pytest.approx(5.6 * 10)


def test_every_segment_keeps_its_best():
    bits = torch.linspace(2.05, 8.4, 400, dtype=torch.float64)
    points = torch.stack([bits, torch.rand(400, dtype=torch.float64)], 1)
    chosen = points[front_by_segment(points)]
    assert set(segment(chosen[:, 0]).tolist()) == set(range(SEGMENTS))
    # A point stays although a neighbouring segment has one with fewer bits and less loss.
    assert len(chosen) > len(front(points))
    for part in range(SEGMENTS):
        own = points[segment(points[:, 0]) == part]
        assert own[:, 1].min() in chosen[segment(chosen[:, 0]) == part][:, 1]


def test_expected_improvement_is_the_mean_of_sampled_improvements():
    rng = torch.Generator().manual_seed(0)
    points = torch.tensor([[2.5, 9.0], [3.0, 4.0], [4.0, 1.0], [6.0, 0.5]],
                          dtype=torch.float64)
    bits = torch.tensor([2.2, 3.0, 3.5, 5.0, 8.5], dtype=torch.float64)
    mean = torch.tensor([8.0, 5.0, 2.0, 0.3, 2.0], dtype=torch.float64)
    spread = torch.tensor([2.0, 1.0, 1.0, 0.3, 0.01], dtype=torch.float64)
    expected_gain = expected_improvement(bits, mean, spread, points, REFERENCE)
    before = hypervolume(points, REFERENCE)
    for i in range(len(bits)):
        draws = mean[i] + spread[i] * torch.randn(2000, generator=rng, dtype=torch.float64)
        gains = [hypervolume(torch.cat([points, torch.tensor([[bits[i], y]])]), REFERENCE)
                 - before for y in draws]
        error = 4 * np.std(gains) / 2000 ** 0.5
        assert float(expected_gain[i]) == pytest.approx(np.mean(gains), abs=error + 1e-6)


def test_a_certain_improvement_is_the_difference_of_hypervolumes():
    points = torch.tensor([[3.0, 4.0], [5.0, 1.0]], dtype=torch.float64)
    new = torch.tensor([[2.5, 3.0]], dtype=torch.float64)
    gain = hypervolume(torch.cat([points, new]), REFERENCE) - hypervolume(points, REFERENCE)
    tiny = torch.tensor([1e-9], dtype=torch.float64)
    expected_gain = expected_improvement(new[:, 0], new[:, 1], tiny, points, REFERENCE)
    assert float(expected_gain) == pytest.approx(gain)
