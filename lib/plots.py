"""One look for all figures: legible on a projector, safe for the colour-blind."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np

from lib.configuration import KINDS, Configuration

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
    """Running mean over `window` values around each (fewer at the ends)."""
    sums = np.cumsum(np.concatenate([[0.0], np.asarray(values, dtype=float)]))
    at, half = np.arange(len(values)), window // 2
    # The same number on both sides, so that a falling curve is not shifted.
    half = np.minimum(half, np.minimum(at, len(values) - 1 - at))
    return (sums[at + half + 1] - sums[at - half]) / (2 * half + 1)


def heat_map(configuration: Configuration) -> None:
    """Bits a weight of each layer: blocks to the right, kinds downward."""
    rows = np.array(configuration.grid()).T
    image = plt.imshow(rows, aspect="auto", cmap="cividis", vmin=2, vmax=8.6)
    plt.yticks(range(len(KINDS)), [kind.removesuffix("_proj") for kind in KINDS])
    plt.grid(False)
    plt.xlabel("block")
    plt.colorbar(image, label="bits a weight")
