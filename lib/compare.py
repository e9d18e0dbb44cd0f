"""Two ways of adapting at the same plans, seeds and examples, from stored results.

Reads what `python data/results/coa.py` wrote.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.artifacts import ROOT, read_json
from lib.errors import require
from lib.measure import paired_interval

STORED = ROOT / "data" / "results" / "coa"
# Made once for all plans; the others once for each plan.
JOINT = ("coa", "lora", "paper", "alternated", "long", "lora-long")
# The greedy plans at the paper's budgets, and two random ones.
MAIN = ("greedy 2.5", "greedy 3", "greedy 3.5", "greedy 4", "random 4.5", "random 6")


@dataclass(frozen=True)
class Compared:
    """How one way stands to another, with a 95 % interval.

    Attributes:
        value: of losses, the geometric mean of their ratios (below 1: the
            first is better); of scores, the mean difference in points (above
            0: the first is better).
    """

    value: float
    low: float
    high: float
    seeds: int
    plans: int

    def __str__(self) -> str:
        return (f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}] "
                f"({self.seeds} seeds, {self.plans} plans)")


def rows(task: str, method: str, plan: str, stored: Path = STORED) -> dict[int, dict[str, Any]]:
    """{seed: what was measured} of a method at a plan; empty where nothing is stored.

    The bare base, "base", has no seed: it stands under 0.
    """
    if method == "base":
        alone = stored / f"{task}-base.json"
        measured = read_json(alone)["result"]["plans"] if alone.is_file() else {}
        return {0: measured[plan]} if plan in measured else {}
    middle = "" if method in JOINT else f"-{plan.replace(' ', '-')}"
    found = {}
    for file in stored.glob(f"{task}-{method}{middle}-*.json"):
        if seed := re.fullmatch(rf"{task}-{method}{re.escape(middle)}-(\d+)", file.stem):
            measured = read_json(file)["result"]["plans"]
            if plan in measured:
                found[int(seed[1])] = measured[plan]
    return found


def pairs(task: str, one: str, other: str, plans: Sequence[str], stored: Path = STORED
          ) -> list[list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Rows of both by seed and plan, of the seeds that both have at all plans."""
    both = [(rows(task, one, plan, stored), rows(task, other, plan, stored)) for plan in plans]
    seeds = sorted(set.intersection(*({*a} & {*b} for a, b in both))) if both else []
    for a, b in both:
        for seed in seeds:
            require(a[seed]["plan"] == b[seed]["plan"],
                    f"{task}: {one} and {other} were measured at different plans: run them again")
    return [[(a[seed], b[seed]) for a, b in both] for seed in seeds]


def log_ratios(found: Sequence[Sequence[Sequence[dict[str, Any]]]]) -> Tensor:
    """(seeds, plans, groups of ten examples) of rows in pairs: log of the first's loss over
    the second's, of the groups that all have."""
    count = min(len(x["losses"]) for row in found for pair in row for x in pair)
    return torch.tensor([[[x["losses"][:count] for x in pair[::-1]] for pair in row]
                         for row in found], dtype=torch.float64).log().diff(dim=2).squeeze(2)


def compare_losses(task: str, one: str, other: str, plans: Sequence[str] = MAIN,
                   stored: Path = STORED) -> Compared | None:
    """Ratio of held-out losses; None where no seed has all plans.

    Logarithms are averaged, so a plan that few bits have broken counts no more
    than another. Seeds, plans and groups of ten examples each add to the interval.
    """
    found = pairs(task, one, other, plans, stored)
    if not found:
        return None
    ratios = torch.tensor(paired_interval(log_ratios(found))).exp().tolist()
    return Compared(*ratios, seeds=len(found), plans=len(plans))


def compare_scores(task: str, one: str, other: str, plans: Sequence[str] = MAIN,
                   stored: Path = STORED) -> Compared | None:
    """Difference of scores in points, at plans where somebody answers and somebody errs.

    What was not scored, because its loss was hopeless, has no right answer.
    """
    found, kept = pairs(task, one, other, plans, stored), []
    for column in zip(*found, strict=True):
        count = max(len(x.get("score", {}).get("hits", "")) for pair in column for x in pair)
        both = torch.stack([torch.stack([_hits(x, count) for x in pair]) for pair in column])
        if count and 0 < both.mean() < 1:
            kept.append(both[:, 0] - both[:, 1])
    if not kept:
        return None
    return Compared(*(100 * x for x in paired_interval(torch.stack(kept, 1))),
                    seeds=len(found), plans=len(kept))


def _hits(row: dict[str, Any], count: int) -> Tensor:
    hits = row.get("score", {"hits": "0" * count})["hits"]
    return torch.tensor([int(hit) for hit in hits], dtype=torch.float64)
