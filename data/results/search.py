"""Searches on the frozen CoA-LoRA adapter: each piece is a method with a seed.

`python data/results/search.py` makes the pieces that are missing; with names,
those; `python data/results/search.py front` keeps the best plans of all
searches for `python -m lib deploy`. Every evaluation is in a journal, so a
run that is cut goes on where it stopped.
"""

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from alternate import loss_with
from coa import COA, SEEDS, plans_of, text
from make import ADAPTERS, RESULTS, run_pieces
from rivals import at_random, nsga2

from lib.artifacts import BUILD, read_json, sha256, write_json
from lib.bench_search import HELD
from lib.coa import CoaLora
from lib.errors import UserError, require
from lib.pareto import hypervolume, kept, segment
from lib.search import Found, Journal, reference_point, search
from lib.surrogate import Features, numbers, plan_of
from lib.switchable import Switchable
from lib.tasks import sensors

OUT, FRONT = RESULTS / "search", RESULTS.parent / "fronts" / "sensors.json"
ADAPTER = ADAPTERS / "sensors_coa"
METHODS, ALL_SEEDS, EVALUATIONS = ("ours", "random", "nsga2"), (*SEEDS, 3, 4), 60
JOURNALS = BUILD / "search"


@functools.cache
def problem() -> tuple[Switchable, Features, Callable[[torch.Tensor], float], str]:
    """Model, features, the loss of a plan on the fixed held-out batch, the journals' key."""
    base = Switchable.load(cache_mb=1500)
    coa = CoaLora.from_pretrained(base, ADAPTER)
    felt = torch.tensor(read_json(COA / "sensors-plans.json")["result"]["sensitivities"])

    evaluate = loss_with(coa, sensors("validation", HELD))
    key = f"{base.fingerprint[:12]} {sha256(ADAPTER / 'manifest.json')[:12]} {HELD}"
    return base, Features.of(base, felt), evaluate, key


def first_plans(base: Switchable) -> torch.Tensor:
    """(plans, layers) level numbers of the training set."""
    return torch.stack([*map(numbers, plans_of("sensors", base.layers)[0])])


def starting() -> dict[str, Any]:
    """Losses of the training set's plans, where every method begins.

    They are stored, because another machine would find others in the last bits.
    """
    base, features, evaluate, key = problem()
    journal = Journal(JOURNALS / "start.jsonl", key)
    found = Found.at(first_plans(base), features, evaluate, journal)
    return {"key": key, "losses": [journal.known[tuple(p)] for p in found.plans.tolist()]}


def start(own: Journal) -> Found:
    """The training set's plans at their stored losses. The journal learns them, too."""
    base, features, evaluate, key = problem()
    stored = read_json(OUT / "start.json")["result"]
    require(stored["key"] == key, "the stored start is of another adapter: make it anew, "
            "`python data/results/search.py start`")
    plans = first_plans(base)
    own.known |= {tuple(plan): loss for plan, loss in zip(
        plans.tolist(), stored["losses"], strict=True)}
    return Found.at(plans, features, evaluate, own)


def piece(method: str, seed: int) -> dict[str, Any]:
    """One method from the starting set, its hypervolume after each evaluation."""
    base, features, evaluate, key = problem()
    # A journal each, so that two searches can run side by side.
    journal = Journal(JOURNALS / f"{method}-{seed}.jsonl", key)
    first = start(journal)
    options = {"evaluations": EVALUATIONS, "seed": seed, "journal": journal}
    found = {
        "ours": lambda: search(first, features, evaluate, **options),
        "random": lambda: at_random(first, features, evaluate, base.layers, **options),
        "nsga2": lambda: nsga2(first, features, evaluate, **options),
    }[method]()
    reference = reference_point(first.points)
    volumes = [hypervolume(found.points[:i], reference)
               for i in range(len(first.plans), len(found.plans) + 1)]
    return {"reference": [float(reference[0]), math.exp(float(reference[1]))],
            "start": len(first.plans), "hypervolume": volumes[-1], "without_search": volumes[0],
            "hypervolumes": [round(v, 6) for v in volumes],
            "raw_hypervolume": _raw(found, reference), "raw_without": _raw(first, reference),
            "segments": len(segment(found.points[:, 0]).unique()),
            "points": [[round(b, 4), round(math.exp(y), 5)] for b, y in found.points.tolist()]}


def _raw(found: Found, reference: torch.Tensor) -> float:
    """Hypervolume with the loss itself instead of its logarithm."""
    points = found.points.clone()
    points[:, 1] = points[:, 1].exp()
    return hypervolume(points, torch.stack([reference[0], reference[1].exp()]))


def stored_front(adapter: str) -> dict[tuple[int, ...], float]:
    """{plan: loss} of the stored front, if it is of this adapter: searches made elsewhere."""
    stored = read_json(FRONT) if FRONT.is_file() else {}
    rows = stored["front"] if stored.get("adapter") == adapter else []
    return {tuple(map(int, row["levels"].split())): row["loss"] for row in rows}


def keep_front() -> None:
    """Store the plans that are best in their segment among all that were evaluated."""
    base, features, _, key = problem()
    adapter = sha256(ADAPTER / "manifest.json")
    known = stored_front(adapter)
    for file in sorted(JOURNALS.glob("*.jsonl")):
        known |= Journal(file, key).known
    plans = torch.tensor([*known])
    losses = torch.tensor([*known.values()], dtype=torch.float64)
    points = torch.stack([features.bits(plans), losses], 1)
    rows = sorted(kept(points), key=lambda i: float(points[i, 0]))
    write_json(FRONT, {
        "command": "python data/results/search.py front", "base_hash": base.fingerprint,
        "adapter": adapter, "evaluated": len(plans), "front": [
            {"bits": float(points[i, 0]), "loss": float(losses[i]),
             "levels": text(plan_of(base.layers, plans[i].tolist()))} for i in rows]})
    print(f"{FRONT.name}: {len(rows)} of {len(plans)} plans")


PIECES = {"start": starting} | {
    f"{method}-{seed}": functools.partial(piece, method, seed)
    for seed in ALL_SEEDS for method in METHODS}

if __name__ == "__main__":
    try:
        if sys.argv[1:] == ["front"]:
            keep_front()
        else:
            run_pieces(sys.argv[1:], PIECES, results=OUT, script="search.py")
    except UserError as error:
        sys.exit(f"error: {error}")
