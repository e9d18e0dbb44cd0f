"""Two ways of adapting at the same configurations, seeds and examples, from stored results."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.errors import require
from lib.evaluate.scores import paired_interval
from lib.files import ROOT, read_json

STORED = ROOT / "data" / "results" / "coa"
# Methods with one adapter for all configurations; the others have one for each.
JOINT = ("coa", "lora", "paper", "alternated", "distilled", "long", "lora-long")
# The greedy configurations at the paper's budgets, and two random ones.
MAIN = ("greedy 2.5", "greedy 3", "greedy 3.5", "greedy 4", "random 4.5", "random 6")


@dataclass(frozen=True)
class Compared:
    """How one method compares with another, with a 95 % interval.

    Attributes:
        value: of losses, the geometric mean of their ratios (below 1: the
            first is better); of scores, the mean difference in points (above
            0: the first is better).
    """

    value: float
    low: float
    high: float
    seeds: int
    configurations: int

    def __str__(self) -> str:
        seeds = f"{self.seeds} seed" + "s" * (self.seeds != 1)
        return (f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}] "
                f"({seeds}, {self.configurations} configurations)")


def rows(task: str, method: str, name: str, stored: Path = STORED) -> dict[int, dict[str, Any]]:
    """{seed: measured values} of a method at a configuration; empty where nothing is stored.

    The bare base, "base", has no seed: its values are under 0.
    """
    if method == "base":
        alone = stored / f"{task}-base.json"
        measured = read_json(alone)["result"]["plans"] if alone.is_file() else {}
        return {0: measured[name]} if name in measured else {}
    middle = "" if method in JOINT else f"-{name.replace(' ', '-')}"
    found = {}
    for file in stored.glob(f"{task}-{method}{middle}-*.json"):
        if seed := re.fullmatch(rf"{task}-{method}{re.escape(middle)}-(\d+)", file.stem):
            measured = read_json(file)["result"]["plans"]
            if name in measured:
                found[int(seed[1])] = measured[name]
    return found


def pairs(task: str, one: str, other: str, configurations: Sequence[str], stored: Path = STORED
          ) -> list[list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Rows of both by seed and configuration, for the seeds that both have at all of them."""
    both = [(rows(task, one, name, stored), rows(task, other, name, stored))
            for name in configurations]
    seeds = sorted(set.intersection(*({*a} & {*b} for a, b in both))) if both else []
    for a, b in both:
        for seed in seeds:
            require(a[seed]["plan"] == b[seed]["plan"],
                    f"{task}: {one} and {other} were measured at different configurations: "
                    "run them again")
    return [[(a[seed], b[seed]) for a, b in both] for seed in seeds]


def log_ratios(rows_in_pairs: Sequence[Sequence[Sequence[dict[str, Any]]]]) -> Tensor:
    """Logarithm of the first's loss over the second's, from rows in pairs.

    Of shape (seeds, configurations, groups of ten examples); the groups that all rows have.
    """
    count = min(len(x["losses"]) for row in rows_in_pairs for pair in row for x in pair)
    losses = torch.tensor([[[x["losses"][:count] for x in pair] for pair in row]
                           for row in rows_in_pairs], dtype=torch.float64)
    return losses[:, :, 0].log() - losses[:, :, 1].log()


def compare_losses(task: str, one: str, other: str, configurations: Sequence[str] = MAIN,
                   stored: Path = STORED) -> Compared | None:
    """Ratio of held-out losses; None where no seed has all configurations.

    Logarithms are averaged, so a configuration with too few bits counts no more than another.
    Seeds, configurations and groups of ten examples each add to the interval.
    """
    rows_in_pairs = pairs(task, one, other, configurations, stored)
    if not rows_in_pairs:
        return None
    ratios = torch.tensor(paired_interval(log_ratios(rows_in_pairs))).exp().tolist()
    return Compared(*ratios, seeds=len(rows_in_pairs), configurations=len(configurations))


def compare_scores(task: str, one: str, other: str, configurations: Sequence[str] = MAIN,
                   stored: Path = STORED) -> Compared | None:
    """Difference of scores in points.

    Counts the configurations where the two methods' answers are neither all right nor all
    wrong. What was not scored, because its loss was hopeless, has no right answer.
    """
    rows_in_pairs, gaps = pairs(task, one, other, configurations, stored), []
    for column in zip(*rows_in_pairs, strict=True):
        count = max(len(x.get("score", {}).get("hits", "")) for pair in column for x in pair)
        both = torch.stack([torch.stack([_hits(x, count) for x in pair]) for pair in column])
        if count and 0 < both.mean() < 1:
            gaps.append(both[:, 0] - both[:, 1])
    if not gaps:
        return None
    return Compared(*(100 * x for x in paired_interval(torch.stack(gaps, 1))),
                    seeds=len(rows_in_pairs), configurations=len(gaps))


def _hits(row: dict[str, Any], count: int) -> Tensor:
    hits = row.get("score", {"hits": "0" * count})["hits"]
    return torch.tensor([int(hit) for hit in hits], dtype=torch.float64)
