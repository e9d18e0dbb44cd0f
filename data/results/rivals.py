"""What the search is compared with: random plans, and NSGA-II, at as many evaluations."""

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

from lib.configuration import Layers
from lib.plans import BUDGETS, random_plan
from lib.search import FIELDS, STRIDES, Evaluate, Found, Journal
from lib.surrogate import Features, numbers


def at_random(start: Found, features: Features, evaluate: Evaluate, layers: Layers, *,
              evaluations: int, seed: int, journal: Journal) -> Found:
    """Random plans at budgets drawn evenly."""
    rng = random.Random(seed)
    plans = [random_plan(layers, rng.uniform(*BUDGETS), rng) for _ in range(evaluations)]
    return start + Found.at(torch.stack([numbers(p) for p in plans]), features, evaluate, journal)


class _Plans(Problem):
    """The fields of all layers as whole numbers; keeps what was evaluated."""

    def __init__(self, layers: int, look: Callable[[torch.Tensor], Found]) -> None:
        super().__init__(n_var=layers * len(FIELDS), n_obj=2, xl=0, vtype=int,
                         xu=np.tile(np.array(FIELDS) - 1, layers))
        self.look, self.seen = look, []

    def _evaluate(self, x: np.ndarray, out: dict, *_: object, **__: object) -> None:
        places = torch.from_numpy(x.astype(np.int64)).view(len(x), -1, len(FIELDS))
        self.seen.append(self.look((places * torch.tensor(STRIDES)).sum(2)))
        out["F"] = self.seen[-1].points.numpy()


def nsga2(start: Found, features: Features, evaluate: Evaluate, *, evaluations: int,
          seed: int, journal: Journal, batch: int = 5) -> Found:
    """NSGA-II (Deb et al. 2002) of pymoo over the fields of all layers, from the same start."""
    strides, counts = torch.tensor(STRIDES), torch.tensor(FIELDS)
    problem = _Plans(start.plans.shape[1],
                     lambda plans: Found.at(plans, features, evaluate, journal))
    algorithm = NSGA2(
        pop_size=len(start.plans), n_offsprings=batch,
        sampling=(start.plans[..., None] // strides % counts).flatten(1).numpy(),
        crossover=SBX(vtype=float, repair=RoundingRepair()),
        mutation=PM(vtype=float, repair=RoundingRepair()))
    minimize(problem, algorithm, ("n_eval", len(start.plans) + evaluations), seed=seed)
    found = problem.seen[0]
    for new in problem.seen[1:]:
        found = found + new
    total = len(start.plans) + evaluations
    return Found(found.plans[:total], found.points[:total])
