"""The search against others at equal numbers of evaluations, and what a round costs."""

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import Problem
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.optimize import minimize

from lib.artifacts import ROOT, read_json, versions
from lib.base_model import load_tokenizer, machine, quiet
from lib.coa import CoaLora
from lib.configuration import Layers
from lib.measure import middle_and_spread
from lib.plans import BUDGETS, random_plan, sensitivities
from lib.search import (
    FIELDS,
    STRIDES,
    Evaluate,
    Found,
    Journal,
    propose,
    reference_point,
)
from lib.surrogate import Features, Surrogate, numbers
from lib.switchable import Switchable
from lib.tasks import held_out_loss, sensors

REPEATS, EVALUATED = 5, 300
# Examples of the held-out batch that a search looks at: the same for all plans.
HELD = 24
STORED = ROOT / "data" / "results" / "search"


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


def search() -> dict[str, Any]:
    """Seconds of a round at 300 evaluated plans, of an evaluation; stored hypervolumes."""
    quiet()
    base, rng = Switchable.load(), random.Random(0)
    features = Features.of(base, sensitivities(base, sensors("train", 8)))
    plans = torch.stack([numbers(random_plan(base.layers, rng.uniform(*BUDGETS), rng))
                         for _ in range(EVALUATED)])
    # A round's time does not depend on where the losses come from.
    logs = features.sums(plans)[:, 0].log()
    found = Found(plans, torch.stack(
        [features.bits(plans), logs + 0.1 * torch.randn(EVALUATED, dtype=torch.float64)], 1))
    rows: dict[str, list[float]] = {"round_s": [], "evaluation_s": []}
    for seed in range(REPEATS):
        start = time.perf_counter()
        surrogate = Surrogate(seed=seed).fit(features.sums(plans), found.points[:, 1])
        propose(found, features, surrogate, reference_point(found.points), count=5, rng=rng)
        rows["round_s"].append(time.perf_counter() - start)
    coa = CoaLora.from_pretrained(base, ROOT / "data" / "adapters" / "sensors_coa")
    held, tokenizer = sensors("validation", HELD), load_tokenizer()
    for _ in range(REPEATS):
        plan = random_plan(base.layers, rng.uniform(*BUDGETS), rng)
        start = time.perf_counter()
        base.switch(plan)
        held_out_loss(coa.model, tokenizer, held)
        rows["evaluation_s"].append(time.perf_counter() - start)
    return {"machine": machine(), "versions": versions(), "hypervolume": {
        file.stem: read_json(file)["result"]["hypervolume"]
        for file in sorted(STORED.glob("*-*.json"))}} | middle_and_spread(rows)
