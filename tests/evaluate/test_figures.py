"""Figures: smoothed curves, and memory that is measured."""

import pytest
import torch

from lib.base.model import release_memory
from lib.evaluate.scores import peak_memory, smoothed


def test_smoothing_shifts_no_curve() -> None:
    line = [2.0 * i - 5 for i in range(20)]
    assert smoothed(line) == pytest.approx(line)
    assert smoothed([0, 3, 0, 3, 0], 3) == pytest.approx([0, 1, 2, 1, 0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own memory is measured there")
def test_peak_memory_sees_what_is_gone_again() -> None:
    release_memory()  # what other tests left would be taken again, unseen
    with peak_memory(0.001) as before:
        pass
    with peak_memory(0.001) as peak:
        for _ in range(20):
            torch.ones(30_000_000)
    assert peak["mb"] > before["mb"] + 60
