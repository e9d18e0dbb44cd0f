"""The search's rivals with as many evaluations: random configurations, and NSGA-II."""

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import Problem
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.optimize import minimize

from lib.coa.configuration import Layers, random_configuration
from lib.coa.pareto import HIGH, LOW, Evaluate, Evaluated, Features, Journal
from lib.quantize.formats import GRID

# A format's number is built from the positions of its fields, as itertools.product counts.
FIELDS = tuple(len(values) for values in GRID.values())
STRIDES = tuple(math.prod(FIELDS[i + 1:]) for i in range(len(FIELDS)))


def at_random(start: Evaluated, features: Features, evaluate: Evaluate, layers: Layers, *,
              evaluations: int, seed: int, journal: Journal) -> Evaluated:
    """Random configurations at budgets drawn evenly."""
    rng = random.Random(seed)
    candidates = torch.stack([
        random_configuration(layers, rng.uniform(LOW, HIGH), rng).numbers
        for _ in range(evaluations)])
    return start + Evaluated.at(candidates, features, evaluate, journal)


class _Fields(Problem):
    """The fields of all layers as whole numbers; remembers what was evaluated."""

    def __init__(self, layers: int, evaluate: Callable[[torch.Tensor], Evaluated]) -> None:
        super().__init__(n_var=layers * len(FIELDS), n_obj=2, xl=0, vtype=int,
                         xu=np.tile(np.array(FIELDS) - 1, layers))
        self.evaluate_batch, self.batches = evaluate, []

    def _evaluate(self, x: np.ndarray, out: dict, *_: object, **__: object) -> None:
        positions = torch.from_numpy(x.astype(np.int64)).view(len(x), -1, len(FIELDS))
        self.batches.append(self.evaluate_batch((positions * torch.tensor(STRIDES)).sum(2)))
        out["F"] = self.batches[-1].points.numpy()


def nsga2(start: Evaluated, features: Features, evaluate: Evaluate, *, evaluations: int,
          seed: int, journal: Journal, batch: int = 5) -> Evaluated:
    """NSGA-II (Deb et al. 2002) of pymoo over the fields of all layers, from the same start."""
    strides, counts = torch.tensor(STRIDES), torch.tensor(FIELDS)
    problem = _Fields(start.configurations.shape[1],
                      lambda batch: Evaluated.at(batch, features, evaluate, journal))
    algorithm = NSGA2(
        pop_size=len(start.configurations), n_offsprings=batch,
        sampling=(start.configurations[..., None] // strides % counts).flatten(1).numpy(),
        crossover=SBX(vtype=float, repair=RoundingRepair()),
        mutation=PM(vtype=float, repair=RoundingRepair()))
    minimize(problem, algorithm, ("n_eval", len(start.configurations) + evaluations), seed=seed)
    evaluated = problem.batches[0]
    for batch_of_new in problem.batches[1:]:
        evaluated = evaluated + batch_of_new
    total = len(start.configurations) + evaluations
    return Evaluated(evaluated.configurations[:total], evaluated.points[:total])
