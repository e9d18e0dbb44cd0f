"""Configurations for a budget of bits: at random, or greedily by quantisation error."""

import functools
import random
from collections.abc import Sequence

import torch

from lib.configuration import LEVELS, Configuration, Layers, Level
from lib.errors import UserError, require
from lib.quantize import rounded
from lib.switchable import Switchable

# Where the paper's budgets start and end, bits a weight.
BUDGETS = (2.25, 7.25)
TOLERANCE = 0.05
SAMPLE = 1 << 14


def random_plan(layers: Layers, budget: float, rng: random.Random) -> Configuration:
    """Random levels whose bits a weight are within 0.05 of the budget.

    Levels are drawn with weights exp(t * bits); t is set so that the mean is
    the budget. Then single layers are drawn again until the sum fits, too.

    Raises:
        UserError: a budget that the levels cannot reach.
    """
    costs = [level.bits_per_parameter for level in LEVELS]
    require(min(costs) < budget < max(costs) - TOLERANCE, f"{budget} bits a weight cannot be "
            f"reached: use {min(costs):.2f} to {max(costs) - TOLERANCE:.2f}")
    weights = _tilted(costs, budget)
    levels = rng.choices(LEVELS, weights, k=len(layers.sizes))
    total = sum(layers.sizes)
    spent = sum(x.bits_per_parameter * n for x, n in zip(levels, layers.sizes, strict=True))
    for _ in range(10_000):
        if abs(spent / total - budget) <= TOLERANCE:
            return Configuration(layers, tuple(levels))
        index = rng.randrange(len(levels))
        new = rng.choices(LEVELS, weights)[0]
        change = (new.bits_per_parameter - levels[index].bits_per_parameter
                  ) * layers.sizes[index]
        if abs(spent + change - budget * total) < abs(spent - budget * total):
            levels[index], spent = new, spent + change
    raise UserError(f"no mixture of levels was found at {budget} bits a weight for "
                    f"{len(levels)} layers: choose another budget")


def _tilted(costs: Sequence[float], mean: float) -> list[float]:
    """Weights exp(t * cost) with t such that the weighted mean is `mean` (bisection)."""
    values, low, high = torch.tensor(costs, dtype=torch.float64), -40.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        share = (middle * values).softmax(0)
        low, high = (middle, high) if share @ values < mean else (low, middle)
    return share.tolist()


@functools.cache
def best_levels(grid: str = "nf", count: int = 1 << 16) -> tuple[Level, ...]:
    """The levels on the lower convex hull of error over bits, for normal numbers.

    A mixture of two levels beats every level above that hull.
    """
    weight = torch.randn(count, generator=torch.Generator().manual_seed(0))
    points = sorted((((level.bits_per_parameter, squared_error(weight, level, grid)), level)
                     for level in LEVELS), key=lambda pair: pair[0])
    hull: list[tuple[tuple[float, float], Level]] = []
    for point, level in points:
        while len(hull) > 1 and _slope(hull[-2][0], hull[-1][0]) >= _slope(hull[-2][0], point):
            hull.pop()
        hull.append((point, level))
    lowest = min(range(len(hull)), key=lambda i: hull[i][0][1])
    return tuple(level for _, level in hull[: lowest + 1])


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    run = right[0] - left[0]
    # Equal bits: only the smaller error, which sorts first, is of use.
    return (right[1] - left[1]) / run if run else float("inf")


def squared_error(weight: torch.Tensor, level: Level, grid: str = "nf") -> float:
    """Sum of squared differences between a weight and what the level makes of it."""
    return float((rounded(weight, level, grid) - weight).square().sum())


def error_table(base: Switchable) -> tuple[tuple[Level, ...], torch.Tensor]:
    """Levels worth choosing from, and each layer's squared error at each, (layers, levels).

    The error is taken on a sample of whole blocks and scaled to the layer.
    """
    levels = best_levels(base.grid)
    rows = []
    for index, size in enumerate(base.layers.sizes):
        weight = base.weight(index).reshape(-1)
        step = max(1, size // SAMPLE)
        part = weight[: size // 64 * 64].view(-1, 64)[::step].reshape(-1)
        rows.append([squared_error(part, level, base.grid) * size / part.numel()
                     for level in levels])
    return levels, torch.tensor(rows)


def greedy_plan(layers: Layers, budget: float, levels: Sequence[Level],
                errors: torch.Tensor) -> Configuration:
    """Spend bits where one more saves most squared error, up to the budget.

    Every layer starts at the cheapest level; each move takes the layer and the
    higher level with the largest fall of the error for each bit spent.

    Args:
        levels, errors: of `error_table`, levels ascending in bits.

    Raises:
        UserError: a budget below the cheapest level.
    """
    costs = [level.bits_per_parameter for level in levels]
    require(budget >= costs[0], f"{budget} bits a weight are below the cheapest level, "
            f"{costs[0]:.2f}")
    moves = []
    for index, size in enumerate(layers.sizes):
        at = 0
        # Steps along the lower convex hull have falling gains, so sorting all
        # layers' steps by gain is the greedy order.
        while at < len(levels) - 1:
            gains = [(float(errors[index, at] - errors[index, to])
                      / ((costs[to] - costs[at]) * size), to)
                     for to in range(at + 1, len(levels))]
            gain, to = max(gains)
            if gain <= 0:
                break
            moves.append((gain, index, to, (costs[to] - costs[at]) * size))
            at = to
    chosen, stuck = [0] * len(layers.sizes), set()
    left = (budget - costs[0]) * sum(layers.sizes)
    for _, index, to, cost in sorted(moves, key=lambda move: -move[0]):
        if cost > left:
            stuck.add(index)  # its later moves build on this one
        elif index not in stuck:
            chosen[index], left = to, left - cost
    return Configuration(layers, tuple(levels[i] for i in chosen))


def starting_set(base: Switchable, table: tuple[Sequence[Level], torch.Tensor], *,
                 count: int = 50, seed: int = 0) -> list[Configuration]:
    """Configurations spread over the budgets: random and greedy ones in turn.

    Args:
        table: of `error_table`.
    """
    rng = random.Random(seed)
    levels, errors = table
    low, high = BUDGETS
    budgets = [low + (high - low) * (i + 0.5) / (count // 2) for i in range(count // 2)]
    greedy = functools.partial(greedy_plan, base.layers, levels=levels, errors=errors)
    pairs = [(random_plan(base.layers, b, rng), greedy(b)) for b in budgets]
    return [plan for pair in pairs for plan in pair]
