"""What a round of the search and an evaluation cost; the hypervolumes that are stored."""

import random
import time
from typing import Any

import torch

from lib.artifacts import ROOT, read_json
from lib.base_model import load_tokenizer, quiet
from lib.coa import CoaLora
from lib.measure import middle_and_spread
from lib.plans import BUDGETS, random_plan, sensitivities
from lib.search import Found, propose, reference_point
from lib.surrogate import Features, Surrogate, numbers
from lib.switchable import Switchable
from lib.tasks import held_out_loss, sensors

REPEATS, EVALUATED = 5, 300
# Examples of the held-out batch that a search looks at: the same for all plans.
HELD = 24
STORED = ROOT / "data" / "results" / "search"


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
    return {"hypervolume": {
        file.stem: read_json(file)["result"]["hypervolume"]
        for file in sorted(STORED.glob("*-*.json"))}} | middle_and_spread(rows)
