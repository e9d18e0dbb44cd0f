"""What a round of the search and an evaluation cost; the hypervolumes that are stored."""

import random
import time
from typing import Any

import torch

from data.evidence.bench import median_and_range
from lib.base.embedded import quiet
from lib.base.model import load_tokenizer
from lib.base.records import sensors
from lib.coa.adapter import CoaLora
from lib.coa.configuration import Switchable, random_configuration, sensitivities
from lib.coa.pareto import HIGH, LOW, Evaluated, Features, Surrogate, propose, reference_point
from lib.evaluate.scores import held_out_loss
from lib.files import ROOT, read_json

REPEATS, EVALUATED = 5, 300
# Held-out examples by which a search judges every configuration.
HELD = 24
STORED = ROOT / "data" / "results" / "search"


def search() -> dict[str, Any]:
    """Seconds of a round at 300 evaluated configurations and of an evaluation; hypervolumes."""
    quiet()
    base, rng = Switchable.load(), random.Random(0)
    features = Features.of(base, sensitivities(base, sensors("train", 8)))
    configurations = torch.stack([
        random_configuration(base.layers, rng.uniform(LOW, HIGH), rng).numbers
        for _ in range(EVALUATED)])
    sums = features.sums(configurations)
    # A round's time does not depend on where the losses come from.
    logs = sums[:, 0].log() + 0.1 * torch.randn(EVALUATED, dtype=torch.float64)
    evaluated = Evaluated(configurations, torch.stack([features.bits(configurations), logs], 1))
    rows: dict[str, list[float]] = {"round_s": [], "evaluation_s": []}
    for seed in range(REPEATS):
        start = time.perf_counter()
        surrogate = Surrogate(sums, evaluated.points[:, 1], seed=seed)
        propose(evaluated, features, surrogate, reference_point(evaluated.points), count=5,
                rng=rng)
        rows["round_s"].append(time.perf_counter() - start)
    coa = CoaLora.from_pretrained(base, ROOT / "data" / "adapters" / "sensors_coa")
    held, tokenizer = sensors("validation", HELD), load_tokenizer()
    for _ in range(REPEATS):
        configuration = random_configuration(base.layers, rng.uniform(LOW, HIGH), rng)
        start = time.perf_counter()
        base.switch(configuration)
        held_out_loss(coa.model, tokenizer, held)
        rows["evaluation_s"].append(time.perf_counter() - start)
    return {"hypervolume": {
        file.stem: read_json(file)["result"]["hypervolume"]
        for file in sorted(STORED.glob("*-*.json"))}} | median_and_range(rows)
