"""Pareto search over configurations (Ye, Tang, Ngai, arXiv 2509.25214, section 4).

Plans are rows of level numbers, one a layer; points are (bits a weight,
logarithm of the loss). A round fits the surrogate, climbs from kept plans
along finite differences of the expected hypervolume improvement, and
evaluates what it found.
"""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lib.configuration import GRID
from lib.errors import UserError, require
from lib.pareto import HIGH, LOW, SEGMENTS, expected_improvement, kept, require_reference, segment
from lib.plans import best_levels, spend
from lib.scratch import replacing
from lib.surrogate import NUMBERS, Features, Surrogate

Evaluate = Callable[[Tensor], float]
# A level's number is made of its fields' places, as itertools.product counts.
FIELDS = tuple(len(values) for values in GRID.values())
STRIDES = tuple(math.prod(FIELDS[i + 1:]) for i in range(len(FIELDS)))
STARTS, STEPS, TOGETHER = 5, 6, 32
# Of a round's plans, how many go to segments where there is none yet.
COVER = 2


class Journal:
    """Every evaluation as a line of JSON; a known plan is not evaluated again.

    A search that is cut and run again goes the same way, and finds its
    evaluations here. The first line says what they belong to.

    Raises:
        UserError: a file that belongs to something else, or is damaged.
    """

    def __init__(self, path: Path | None = None, key: str = "") -> None:
        self.path, self.known = path, {}
        if path and path.is_file():
            lines = path.read_bytes().split(b"\n")[:-1]  # a line that was cut has no end
            self._read(lines, key)
            _keep(path, [line.decode() for line in lines])
        elif path:
            _keep(path, [json.dumps({"key": key})])

    def _read(self, lines: Sequence[bytes], key: str) -> None:
        try:
            rows = [json.loads(line.decode()) for line in lines]
            found = rows[0]["key"] if rows else None
            self.known = {tuple(row["levels"]): float(row["loss"]) for row in rows[1:]}
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"{self.path} is no journal of a search ({error}): "
                            "remove it") from None
        require(found == key, f"{self.path} belongs to another search ({found}, not {key}): "
                "remove it or name another")

    def __call__(self, plan: Tensor, bits: float, evaluate: Evaluate) -> float:
        """The plan's loss, from the file or evaluated now."""
        levels = tuple(plan.tolist())
        if levels not in self.known:
            loss = float(evaluate(plan))
            require(math.isfinite(loss) and loss > 0, f"the loss of a plan at {bits:.3f} bits "
                    f"is {loss}: a search needs a finite loss above 0")
            self.known[levels] = loss
            if self.path:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"bits": round(bits, 6), "loss": loss,
                                           "levels": levels}) + "\n")
        return self.known[levels]


def _keep(path: Path, lines: Sequence[str]) -> None:
    with replacing(path) as part:
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@dataclass
class Found:
    """What a search has evaluated, in order.

    Attributes:
        plans: (n, layers) level numbers.
        points: (n, 2) float64: bits a weight, logarithm of the loss.
    """

    plans: Tensor
    points: Tensor

    @classmethod
    def at(cls, plans: Tensor, features: Features, evaluate: Evaluate, journal: Journal) -> "Found":
        """Evaluate plans."""
        bits = features.bits(plans)
        losses = [math.log(journal(plan, float(b), evaluate))
                  for plan, b in zip(plans, bits, strict=True)]
        return cls(plans, torch.stack([bits, torch.tensor(losses, dtype=torch.float64)], 1))

    def __add__(self, other: "Found") -> "Found":
        return Found(torch.cat([self.plans, other.plans]), torch.cat([self.points, other.points]))


def reference_point(points: Tensor) -> Tensor:
    """8.6 bits, or more where a plan takes more, and 1.1 times the worst loss."""
    reference = torch.stack([torch.clamp(points[:, 0].max() + 0.1, min=8.6),
                             points[:, 1].max() + math.log(1.1)])
    require_reference(points, reference)
    return reference


def search(start: Found, features: Features, evaluate: Evaluate, *, evaluations: int,
           batch: int = 5, seed: int = 0, journal: Journal | None = None) -> Found:
    """Add evaluations to a starting set, in rounds of `batch`.

    Raises:
        UserError: a loss that is not finite; what `evaluate` raises goes through.
    """
    rng, journal = random.Random(seed), journal or Journal()
    found, reference = start, reference_point(start.points)
    while (left := len(start.plans) + evaluations - len(found.plans)) > 0:
        surrogate = Surrogate(seed=seed).fit(features.sums(found.plans), found.points[:, 1])
        new = propose(found, features, surrogate, reference, count=min(batch, left), rng=rng)
        if not len(new):
            break  # the climbs pass no plan that is not known: there is no more to try
        found = found + Found.at(new, features, evaluate, journal)
    return found


def propose(found: Found, features: Features, surrogate: Surrogate, reference: Tensor, *,
            count: int, rng: random.Random) -> Tensor:
    """(count, layers): plans of the highest expected improvement, each given those before.

    The climbs start from kept plans, drawn at random. A plan that is chosen
    counts at its expected loss when the next one is (kriging believer), so a
    batch spreads out. The first ones are for segments that are empty.
    """
    points, rows = found.points, kept(found.points)
    passed = []
    acquire = _Acquisition(features, surrogate, points, reference)
    for row in rng.sample(rows, min(STARTS, len(rows))):
        passed += climb(found.plans[row], acquire)
    known = {tuple(plan.tolist()) for plan in found.plans}
    new = [plan for plan in dict.fromkeys(
        tuple(p.tolist()) for p in passed + fillers(features, points)) if plan not in known]
    if not new:
        return found.plans[:0]
    pool = torch.tensor(new)
    bits, (mean, spread) = features.bits(pool), surrogate.predict(features.sums(pool))
    chosen: list[int] = []
    for turn in range(min(count, len(pool))):
        gain = expected_improvement(bits, mean, spread, points, reference)
        if turn < COVER:  # gains are far below 1e9: what fills a segment comes first
            gain += 1e9 * ~torch.isin(segment(bits), segment(points[:, 0]))
        gain[chosen] = -1.0
        best = int(gain.argmax())
        chosen.append(best)
        points = torch.cat([points, torch.stack([bits[best], mean[best]])[None]])
    return pool[chosen]


def fillers(features: Features, points: Tensor) -> list[Tensor]:
    """For each segment without a point, the plan whose noise is least by greedy spending."""
    columns = torch.tensor([NUMBERS[level] for level in best_levels()])
    empty = set(range(SEGMENTS)) - set(segment(points[:, 0]).tolist())
    noise, cost = features.noise[:, columns], features.cost[:, columns]
    middles = (LOW + (i + 0.5) * (HIGH - LOW) / SEGMENTS for i in sorted(empty))
    return [columns[spend(noise, cost, middle)] for middle in middles]


class _Acquisition:
    """Expected hypervolume improvement by bits and sums of noise."""

    def __init__(self, features: Features, surrogate: Surrogate, points: Tensor,
                 reference: Tensor) -> None:
        self.features, self.surrogate = features, surrogate
        self.points, self.reference = points, reference

    def __call__(self, bits: Tensor, sums: Tensor) -> Tensor:
        mean, spread = self.surrogate.predict(sums)
        return expected_improvement(bits, mean, spread, self.points, self.reference)


def climb(plan: Tensor, acquire: _Acquisition, *, steps: int = STEPS) -> list[Tensor]:
    """The plans passed on the way up the finite differences of the acquisition.

    Each step takes the acquisition at every neighbour (one field of one layer,
    one place on), less that at the plan itself: a true difference at the
    grid's borders, too, where only one neighbour is. The best change of each
    of the most promising layers is made together; of fewer and fewer layers
    if that gains nothing.
    """
    features, passed = acquire.features, []
    layer, new = neighbours(plan)
    bits, sums = features.bits(plan[None]), features.sums(plan[None])
    value = acquire(bits, sums)
    for _ in range(steps):
        old = plan[layer]
        gain = acquire(
            bits + features.cost[layer, new] - features.cost[layer, old],
            sums + (features.noise[layer, new] - features.noise[layer, old])[:, None]
            * features.groups[layer]) - value
        order = gain.argsort(descending=True)
        order = order[gain[order] > 0]
        first = list(dict.fromkeys(layer[order].tolist()))
        best = {one: int(new[order][layer[order] == one][0]) for one in first[:TOGETHER]}
        trials = []
        while best:
            trial = plan.clone()
            trial[list(best)] = torch.tensor(list(best.values()))
            trials.append(trial)
            best = dict(list(best.items())[: len(best) // 2])
        if not trials:
            break
        stacked = torch.stack(trials)
        values = acquire(features.bits(stacked), features.sums(stacked))
        if values.max() <= value:
            break
        plan = stacked[int(values.argmax())]
        bits, sums, value = (features.bits(plan[None]), features.sums(plan[None]), values.max())
        passed.append(plan)
        layer, new = neighbours(plan)
    return passed


def neighbours(plan: Tensor) -> tuple[Tensor, Tensor]:
    """(layer, new level number) of every change of one field.

    Bits, block and group sizes move one place up or down their list; the
    scales' dtype is a category and goes to every other.
    """
    layers, levels = [], []
    for field, (count, stride) in enumerate(zip(FIELDS, STRIDES, strict=True)):
        at = plan // stride % count
        moves = (-2, -1, 1, 2) if list(GRID)[field] == "scale_dtype" else (-1, 1)
        for move in moves:
            fits = ((at + move >= 0) & (at + move < count)).nonzero()[:, 0]
            layers.append(fits)
            levels.append(plan[fits] + move * stride)
    return torch.cat(layers), torch.cat(levels)
