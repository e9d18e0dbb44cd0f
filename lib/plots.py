"""One look for all figures: legible on a projector, safe for the colour-blind."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np

# Okabe and Ito's palette, without its yellow, which a projector loses.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")


def use_style() -> None:
    """Set matplotlib's defaults for the course."""
    plt.rcParams.update({
        "axes.prop_cycle": plt.cycler(color=COLOURS), "figure.figsize": (7.0, 3.6),
        "figure.dpi": 80, "font.size": 11, "axes.grid": True, "grid.alpha": 0.3,
        "axes.spines.top": False, "axes.spines.right": False,
        "figure.constrained_layout.use": True})


def smoothed(values: Sequence[float], window: int = 9) -> np.ndarray:
    """Running mean over the last `window` values (fewer at the start)."""
    sums = np.cumsum(np.concatenate([[0.0], np.asarray(values, dtype=float)]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)
