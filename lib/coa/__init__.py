"""One adapter for every configuration, and the Pareto search (notebook 05)."""

from lib import exports

__getattr__, __all__ = exports(__name__, {
    "configuration": "Configuration Switchable block_and_kind error_table greedy_configuration "
                     "numbers random_configuration sensitivities",
    "adapter": "OWNED PACE CoaLora MixingNetwork", "joint": "train_over",
    "pareto": "Evaluated Features Journal expected_improvement fillers front hypervolume "
              "non_dominated reference_point search"})
