"""Is it any good: scores, losses, intervals, figures (all notebooks)."""

from lib import exports

__getattr__, __all__ = exports(__name__, {
    "scores": "COLOURS Score answer_loss generate held_out_loss keyword_hit keyword_score "
              "paired_interval peak_memory smoothed use_style wilson"})
