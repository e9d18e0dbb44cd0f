"""One adapter for every configuration, and the Pareto search (notebook 05)."""

from lib import exports

__getattr__, __all__ = exports(__name__, {"adapter": "OWNED PACE CoaLora MixingNetwork train_over",
    "configuration": "AnyFormat Configuration Switchable best_formats block_and_kind format_errors "
                     "greedy_configuration known_configurations random_configuration sensitivities",
    "pareto": "Evaluated Features Journal expected_improvement fillers front hypervolume "
              "non_dominated reference_point search"})
