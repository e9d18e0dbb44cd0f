"""The ledger of claims: stored evidence, a rule for each claim, intervals.

A rule is a short function from stored results to a verdict. It names the pieces that
it needs; while one is missing, the verdict is that it was not measured yet.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor

from lib.errors import UserError, require
from lib.evaluate.scores import paired_interval
from lib.files import ROOT, read_json

RESULTS, CLAIMS = ROOT / "data" / "results", ROOT / "data" / "claims.json"
SEEDS = (0, 1, 2)
BATCHES = (8, 40)  # examples in a step, of claim F2
REPRODUCED, REFUTED = "reproduced", "refuted"
# A part of the claim holds, or its number is wrong and its direction right.
PARTLY = "partly right"
# What is measured cannot decide: a coarse grid, a wide interval, one task only.
INCONCLUSIVE = "inconclusive"
# Arithmetic agrees, and nothing of that size was run.
COMPUTED = "computed"
NOT_HERE, NOT_YET = "not measurable here", "not measured yet"
# Below this, random configurations are looked at separately.
FEW_BITS = 4
VERDICTS = (REPRODUCED, PARTLY, INCONCLUSIVE, REFUTED, COMPUTED, NOT_HERE, NOT_YET)
SOURCES = {"T": "tutorial", "P": "paper", "F": "field"}


@dataclass(frozen=True)
class Stored:
    """Results of pieces by name, such as "lora" or "coa/sensors-coa-0"."""

    folder: Path = RESULTS

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def has(self, *names: str) -> bool:
        return all(self.file(name).is_file() for name in names)

    def __getitem__(self, name: str) -> Any:
        return read_json(self.file(name))["result"]

    def require_one_dtype(self, *names: str) -> None:
        """UserError if the stored ones of these pieces were made in different dtypes."""
        dtypes = {n: read_json(self.file(n))["machine"]["dtype"] for n in names if self.has(n)}
        each = ", ".join(f"{name} in {dtype}" for name, dtype in dtypes.items())
        require(len({*dtypes.values()}) < 2, f"Made in different dtypes: {each}")


@dataclass(frozen=True)
class Interval:
    """A number with the low and high end of its 95 % interval, or of its spread."""

    value: float
    low: float
    high: float

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high

    def above(self, bound: float = 0.0) -> bool:
        """The whole interval lies above: only then is anything called better."""
        return self.low > bound

    def below(self, bound: float = 0.0) -> bool:
        """The whole interval lies below."""
        return self.high < bound

    def shows(self, bound: float = 0.0) -> bool | None:
        """Whether the number lies above; None if the interval leaves it open."""
        return True if self.above(bound) else False if self.below(bound) else None

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class Judgement:
    """What a rule makes of the numbers; headline and finding have no full stop."""

    verdict: str
    headline: str
    finding: str
    value: float | int | None = None
    interval: tuple[float, float] | None = None
    details: str = ""  # for those who want to check the finding; the site has them


@dataclass(frozen=True)
class Rule:
    """A claim, how it is measured, the pieces it needs and may use, and its judge."""

    id: str
    claim: str
    short: str
    method: str
    unit: str
    needs: tuple[str, ...]
    also: tuple[str, ...]
    judge: Callable[[Stored], Judgement]


RULES: dict[str, Rule] = {}


def rule(name: str, claim: str, method: str, *, short: str, unit: str, needs: Sequence[str],
         also: Sequence[str] = ()) -> Callable[[Callable[[Stored], Judgement]],
                                              Callable[[Stored], Judgement]]:
    """Enter the function below as the judge of a claim."""
    def enter(judge: Callable[[Stored], Judgement]) -> Callable[[Stored], Judgement]:
        RULES[name] = Rule(name, claim, short, method, unit, tuple(needs), tuple(also), judge)
        return judge
    return enter


def entry(one: Rule, stored: Stored) -> dict[str, Any]:
    """A claim's entry in the ledger, from what is stored now."""
    missing = [name for name in one.needs if not stored.has(name)]
    try:
        judged = (not_yet(f"Still to be made: {listed(missing)}") if missing
                  else one.judge(stored))
    except UserError as error:  # files of different runs, made again one by one
        judged = not_yet(str(error))
    except KeyError as error:  # a piece that an earlier version of its command made
        judged = not_yet(f"A stored piece lacks {error}: make it again")
    files = [n for n in (*one.needs, *one.also) if stored.has(n)]
    return {"id": one.id, "source": SOURCES[one.id[0]], "claim": one.claim, "short": one.short,
            "method": one.method, "value": four_digits(judged.value), "unit": one.unit,
            "interval": [*map(four_digits, judged.interval)] if judged.interval else None,
            "headline": judged.headline, "finding": f"{judged.finding}.",
            "details": judged.details and f"{judged.details}.",
            "verdict": judged.verdict, "evidence": [f"data/results/{n}.json" for n in files],
            "command": [read_json(stored.file(n))["command"] for n in files]}


def of_parts(*parts: bool | None) -> str:
    """The verdict on a claim of several parts: each holds (True), fails (False) or is open (None).

    Reproduced if all hold, refuted if all fail, partly right if at least one holds. Otherwise
    inconclusive: nothing is shown to hold, and something is open.
    """
    if all(parts):
        return REPRODUCED
    if any(parts):
        return PARTLY
    return INCONCLUSIVE if None in parts else REFUTED


def not_yet(reason: str) -> Judgement:
    """There is no verdict, and why."""
    return Judgement(NOT_YET, NOT_YET, reason)


def entries(stored: Stored) -> list[dict[str, Any]]:
    """The whole ledger, the tutorial's claims first."""
    order = sorted(RULES, key=lambda name: ([*SOURCES].index(name[0]), int(name[1:])))
    return [entry(RULES[name], stored) for name in order]


def few_at_random(rows: dict[str, Any]) -> list[str]:
    """Random configurations of few bits: adapters differ most there, so they are shown apart."""
    return [name for name, row in rows.items() if "random" in name and row["bits"] < FEW_BITS]


def listed(names: Sequence[str]) -> str:
    """Names in a row; of many the first two and the last."""
    return ", ".join(names if len(names) < 7 else [*names[:2], "...", names[-1]])


def four_digits(number: float | int | None) -> float | int | None:
    """Four digits, so that the last bits of a machine's sums do not show; whole numbers whole."""
    return float(f"{number:.4g}") if isinstance(number, float) else number


def percent(share: float, digits: int = 1) -> str:
    """A share as it is printed."""
    return f"{100 * share:.{digits}f} %"


def points(ones: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> Interval:
    """Difference of scores on the same examples in points; rows are seeds."""
    gaps = [hits(a) - hits(b) for a, b in zip(ones, others, strict=True)]
    return Interval(*(100 * x for x in paired_interval(torch.stack(gaps))))


def hits(score: dict[str, Any]) -> Tensor:
    """A stored score's examples: 1 where right."""
    return torch.tensor([int(hit) for hit in score["hits"]], dtype=torch.float64)


def ratio(logs: Tensor) -> Interval:
    """Geometric mean of ratios from differences of logarithms, any axes."""
    return Interval(*torch.tensor(paired_interval(logs), dtype=torch.float64).exp().tolist())


def seeds_needed(interval: Interval, half: float) -> int:
    """The least number of seeds that would narrow an interval over `SEEDS` to this half-width.

    The least n with t(n - 1) s / sqrt(n) at most `half`, if the spread s stays and all of the
    width comes from the seeds. Examples add to it, so more may be needed.
    """
    def factor(n: int) -> float:
        return float(stdtrit(n - 1, 0.975)) / n ** 0.5

    now = (interval.high - interval.low) / 2 / factor(len(SEEDS))
    return next(n for n in itertools.count(2) if now * factor(n) <= half)


def spread(row: dict[str, Any], key: str) -> Interval:
    """A benchmark's median with the least and the largest of its repeats."""
    return Interval(row[key], *row[f"{key}_spread"])
