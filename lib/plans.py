"""Configurations for a budget of bits: at random, or greedily by quantisation error."""

import functools
import random
from collections.abc import Sequence

import torch

from lib.base_model import load_tokenizer
from lib.configuration import LEVELS, Configuration, Layers, Level
from lib.errors import UserError, require
from lib.quantize import rounded
from lib.switchable import Switchable
from lib.tasks import Record, answer_loss, encode, pad_right

# Where the paper's budgets start and end, bits a weight.
BUDGETS = (2.25, 7.25)
TOLERANCE = 0.05
SAMPLE = 1 << 12


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
        change = (new.bits_per_parameter - levels[index].bits_per_parameter) * layers.sizes[index]
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


def sensitivities(base: Switchable, records: Sequence[Record], *, more: Sequence[str] = ()
                  ) -> torch.Tensor:
    """(layers,): mean squared gradient of an example's loss by a layer's weights, per weight.

    Noise of energy e, spread evenly over n weights, moves the loss by about
    |g| sqrt(e / n); the square of that is sensitivity times energy.

    Args:
        more: further modules, whose numbers come after the layers'.
    """
    tokenizer = load_tokenizer(base.name)
    weights = [base.model.get_submodule(name).weight for name in (*base.layers.names, *more)]
    total = torch.zeros(len(weights))
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for record in records:
            ids, labels = pad_right([encode(tokenizer, record)], 0)
            loss, tokens = answer_loss(base.model, ids.to(base.model.device),
                                       labels.to(base.model.device))
            grads = torch.autograd.grad(loss / tokens, weights)
            total += torch.stack([g.float().square().mean() for g in grads]).cpu()
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return total / len(records)


def error_table(base: Switchable, felt: torch.Tensor | None = None
                ) -> tuple[tuple[Level, ...], torch.Tensor]:
    """Levels worth choosing from, and each layer's squared error at each, (layers, levels).

    Args:
        felt: (layers,) of `sensitivities`: then the error counts as the loss
            feels it, and plans are far better at few bits.
    """
    levels = best_levels(base.grid)
    table = level_errors(base, levels)
    return levels, table if felt is None else table * felt[:, None]


def level_errors(base: Switchable, levels: Sequence[Level]) -> torch.Tensor:
    """(layers, levels): squared error of each layer at each level, from a sample of blocks.

    Samples of all layers, each over its own root mean square, go through a
    level together; the errors are scaled back to the layers.
    """
    samples, energy = [], []
    count = min(SAMPLE, *(size // 64 * 64 for size in base.layers.sizes))
    for index in range(len(base.layers.sizes)):
        weight = base.weight(index).reshape(-1)
        energy.append(weight.square().sum())
        blocks = weight[: weight.numel() // 64 * 64].view(-1, 64)
        part = blocks[:: weight.numel() // count].reshape(-1)[:count]
        # A layer of zeros stays one.
        samples.append(part / part.square().mean().sqrt().clamp(min=1e-30))
    stacked = torch.stack(samples)
    relative = [(rounded(stacked, level, base.grid) - stacked).square().mean(1) for level in levels]
    return torch.stack(relative, 1) * torch.stack(energy)[:, None]


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
    costs = torch.tensor([level.bits_per_parameter for level in levels])
    require(budget >= costs[0], f"{budget} bits a weight are below the cheapest level, "
            f"{costs[0]:.2f}")
    sizes = torch.tensor(layers.sizes)
    chosen = spend(errors, costs * sizes[:, None], budget * float(sizes.sum()))
    return Configuration(layers, tuple(levels[i] for i in chosen))


def spend(errors: torch.Tensor, costs: torch.Tensor, budget: float) -> list[int]:
    """Which column each row gets, so that errors fall most for what the budget buys.

    Every row starts at its first column; each move takes the row and the later
    column with the largest fall of the error for the cost.

    Args:
        errors, costs: (rows, columns), costs ascending along each row.
    """
    moves = []
    for row, (error, cost) in enumerate(zip(errors.tolist(), costs.tolist(), strict=True)):
        at = 0
        # Steps along the lower convex hull have falling gains, so sorting all
        # rows' steps by gain is the greedy order.
        while at < len(cost) - 1:
            gain, to = max(((error[at] - error[to]) / (cost[to] - cost[at]), to)
                           for to in range(at + 1, len(cost)))
            if gain <= 0:
                break
            moves.append((gain, row, to, cost[to] - cost[at]))
            at = to
    chosen, stuck = [0] * len(errors), set()
    left = budget - float(costs[:, 0].sum())
    for _, row, to, cost in sorted(moves, key=lambda move: -move[0]):
        if cost > left:
            stuck.add(row)  # its later moves build on this one
        elif row not in stuck:
            chosen[row], left = to, left - cost
    return chosen
