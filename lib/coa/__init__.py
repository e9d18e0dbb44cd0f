"""One adapter for every configuration, and the Pareto search (notebook 05)."""

from lib import exports

__getattr__, __all__ = exports(__name__, {
    "configuration": "Configuration Switchable best_formats block_and_kind format_errors "
                     "greedy_configuration numbers random_configuration sensitivities",
    "adapter": "OWNED PACE CoaLora MixingNetwork", "joint": "train_over",
    "pareto": "Evaluated Features Journal expected_improvement fillers front hypervolume "
              "non_dominated reference_point search"})
