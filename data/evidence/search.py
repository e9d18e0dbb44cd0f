"""Searches on the frozen CoA-LoRA adapter: each piece is a method with a seed.

Every evaluation goes to a journal, so a search that was cut off goes on where it stopped.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from data.evidence.alternate import loss_with
from data.evidence.bench_search import HELD
from data.evidence.coa import COA, plans_of
from data.evidence.front import JournalFile, write_front
from data.evidence.ledger import SEEDS
from data.evidence.pieces import ADAPTERS, RESULTS, Piece
from data.evidence.rivals import at_random, nsga2
from lib.base.records import sensors
from lib.coa.adapter import CoaLora
from lib.coa.configuration import Switchable, known_configurations
from lib.coa.pareto import (
    Evaluated,
    Features,
    Journal,
    hypervolume,
    reference_point,
    search,
    segment,
)
from lib.errors import require
from lib.files import BUILD, read_json, sha256

OUT, ADAPTER = RESULTS / "search", ADAPTERS / "sensors_coa"
METHODS, ALL_SEEDS, EVALUATIONS = ("ours", "random", "nsga2"), (*SEEDS, 3, 4), 60
JOURNALS = BUILD / "search"


@functools.cache
def problem() -> tuple[Switchable, Features, Callable[[torch.Tensor], float], str]:
    """Model, features, loss of a configuration on fixed held-out examples, key of the journals."""
    base = Switchable.load(cache_mb=1500)
    coa = CoaLora.from_pretrained(base, ADAPTER)
    felt = torch.tensor(read_json(COA / "sensors-plans.json")["result"]["sensitivities"])
    evaluate = loss_with(coa, sensors("validation", HELD))
    key = f"{base.fingerprint[:12]} {sha256(ADAPTER / 'manifest.json')[:12]} {HELD}"
    return base, Features.of(base, felt), evaluate, key


def journal(name: str) -> JournalFile:
    """A journal for each search, so that two can run side by side."""
    return JournalFile(JOURNALS / f"{name}.jsonl", problem()[-1])


def first_configurations(base: Switchable) -> torch.Tensor:
    """(n, layers) format numbers of the training set."""
    return torch.stack([c.numbers for c in plans_of("sensors", base.layers)[0]])


def starting() -> dict[str, Any]:
    """Losses of the training set's configurations, where every method starts.

    They are stored because another machine's would differ in the last bits.
    """
    base, features, evaluate, key = problem()
    own = journal("start")
    start = Evaluated.at(first_configurations(base), features, evaluate, own)
    return {"key": key,
            "losses": [own[tuple(c)] for c in start.configurations.tolist()]}


def start(own: Journal) -> Evaluated:
    """The training set's configurations with their stored losses, which the journal learns."""
    base, features, evaluate, key = problem()
    stored = read_json(OUT / "start.json")["result"]
    require(stored["key"] == key, "the stored start belongs to another adapter: make it again, "
            "`python -m data.evidence search-start`")
    first = first_configurations(base)
    own.update(zip(map(tuple, first.tolist()), stored["losses"], strict=True))  # not into its file
    return Evaluated.at(first, features, evaluate, own)


def run(method: str, seed: int) -> dict[str, Any]:
    """One method from the starting set, with its hypervolume after each evaluation."""
    base, features, evaluate, _ = problem()
    own = journal(f"{method}-{seed}")
    first = start(own)
    options = {"evaluations": EVALUATIONS, "seed": seed, "journal": own}
    evaluated = {
        "ours": lambda: search(first, features, evaluate, **options),
        "random": lambda: at_random(first, features, evaluate, base.layers, **options),
        "nsga2": lambda: nsga2(first, features, evaluate, **options),
    }[method]()
    reference, begin = reference_point(first.points), len(first.configurations)
    volumes = [hypervolume(evaluated.points[:i], reference)
               for i in range(begin, len(evaluated.configurations) + 1)]
    return {"reference": [float(reference[0]), math.exp(float(reference[1]))],
            "start": begin, "hypervolume": volumes[-1], "without_search": volumes[0],
            "hypervolumes": [round(v, 6) for v in volumes],
            "raw_hypervolume": _raw(evaluated, reference), "raw_without": _raw(first, reference),
            "segments": len(segment(evaluated.points[:, 0]).unique()),
            "points": [[round(b, 4), round(math.exp(y), 5)]
                       for b, y in evaluated.points.tolist()]}


def _raw(evaluated: Evaluated, reference: torch.Tensor) -> float:
    """Hypervolume with the loss itself instead of its logarithm."""
    points = evaluated.points.clone()
    points[:, 1] = points[:, 1].exp()
    return hypervolume(points, torch.stack([reference[0], reference[1].exp()]))


def store_front() -> None:
    """Store the best configurations of each segment among all that were evaluated."""
    base, features, _, key = problem()
    known = {tuple(c.numbers.tolist()): loss for c, loss in known_configurations(ADAPTER, base)}
    for file in sorted(JOURNALS.glob("*.jsonl")):
        known |= JournalFile(file, key)
    count = write_front(ADAPTER, base, features, known, command="python -m data.evidence front")
    print(f"{ADAPTER.name}: {count} of {len(known)} configurations")


PIECES = {"search-start": Piece("search/start", starting)} | {
    f"search-{method}-{seed}": Piece(f"search/{method}-{seed}",
                                     functools.partial(run, method, seed))
    for seed in ALL_SEEDS for method in METHODS}
