"""One look for all figures: legible on a projector, safe for the colour-blind."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np

# Okabe and Ito's palette, without its yellow, which a projector loses.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")


def use_style() -> None:
    """Set matplotlib's defaults for the course."""
    plt.rcParams.update({
        "axes.prop_cycle": plt.cycler(color=COLOURS), "figure.figsize": (7.0, 3.6), "font.size": 11,
        "figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True,
        "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})


def smoothed(values: Sequence[float], window: int = 9) -> np.ndarray:
    """Running mean over `window` values around each, fewer at the ends."""
    sums = np.cumsum([0.0, *values])
    at = np.arange(len(values))
    # As many values on the left as on the right, so that a falling curve is not shifted.
    half = np.minimum(window // 2, np.minimum(at, len(values) - 1 - at))
    return (sums[at + half + 1] - sums[at - half]) / (2 * half + 1)
