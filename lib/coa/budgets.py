"""Configurations for a budget of bits: at random, or greedily by quantisation error."""

import functools
import itertools
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from lib.base.model import load_tokenizer, pad_right
from lib.base.records import Record, encode
from lib.coa.configuration import Configuration, Layers, Switchable
from lib.errors import UserError, require
from lib.evaluate.scores import answer_loss
from lib.quantize.formats import FORMATS, Format, round_trip

BUDGETS = (2.25, 7.25)  # the range of the paper's, bits a weight
TOLERANCE = 0.05
SAMPLE = 1 << 12  # weights of a layer from which its error is estimated


def random_configuration(layers: Layers, budget: float, rng: random.Random) -> Configuration:
    """Random formats whose bits a weight are within 0.05 of the budget.

    Formats are drawn with probabilities proportional to exp(t * bits), where t makes their
    mean the budget. Then single layers are redrawn until the sum fits as well.
    """
    costs = torch.tensor([fmt.bits_per_parameter for fmt in FORMATS], dtype=torch.float64)
    least, most = float(costs.min()), float(costs.max()) - TOLERANCE
    require(least < budget < most,
            f"{budget} bits a weight cannot be reached: use {least:.2f} to {most:.2f}")
    low, high = -40.0, 40.0  # of t, by bisection
    for _ in range(80):
        middle = (low + high) / 2
        share = (middle * costs).softmax(0)
        low, high = (middle, high) if share @ costs < budget else (low, middle)
    weights = share.tolist()
    formats = rng.choices(FORMATS, weights, k=len(layers.sizes))
    total = sum(layers.sizes)
    spent = sum(x.bits_per_parameter * n for x, n in zip(formats, layers.sizes, strict=True))
    for _ in range(10_000):
        if abs(spent / total - budget) <= TOLERANCE:
            return Configuration(layers, tuple(formats))
        index = rng.randrange(len(formats))
        new = rng.choices(FORMATS, weights)[0]
        change = (new.bits_per_parameter - formats[index].bits_per_parameter) * layers.sizes[index]
        if abs(spent + change - budget * total) < abs(spent - budget * total):
            formats[index], spent = new, spent + change
    raise UserError(f"found no mixture of formats at {budget} bits a weight: choose another budget")


@functools.cache
def best_formats() -> tuple[Format, ...]:
    """The formats on the lower convex hull of squared error over bits, for normal numbers."""
    weight = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    rows = sorted((fmt.bits_per_parameter,
                   float((round_trip(weight, fmt) - weight).square().sum()), number)
                  for number, fmt in enumerate(FORMATS))
    costs, errors, positions = zip(*rows, strict=True)
    return tuple(FORMATS[positions[i]] for i in _lower_hull(errors, costs))


def _lower_hull(errors: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Indices along the lower convex hull, from the first to the least error; costs ascend."""
    hull = [0]
    while moves := [((errors[hull[-1]] - errors[to]) / (costs[to] - costs[hull[-1]]), to)
                    for to in range(hull[-1] + 1, len(costs)) if costs[to] > costs[hull[-1]]]:
        gain, to = max(moves)
        if gain <= 0:
            break
        hull.append(to)
    return hull


def sensitivities(base: Switchable, records: Sequence[Record], *, more: Sequence[str] = ()
                  ) -> Tensor:
    """(layers,): mean squared gradient of an example's loss by a layer's weights, per weight.

    Noise of energy e, spread evenly over n weights, moves the loss by about |g| sqrt(e / n);
    the square of that is sensitivity times energy. Those of further modules, `more`, follow.
    """
    tokenizer = load_tokenizer(base.name)
    weights = [base.model.get_submodule(name).weight for name in (*base.layers.names, *more)]
    total = torch.zeros(len(weights))
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for record in records:
            ids, labels = pad_right([encode(tokenizer, record)], 0)
            device = base.model.device
            loss, tokens = answer_loss(base.model, ids.to(device), labels.to(device))
            grads = torch.autograd.grad(loss / tokens, weights)
            total += torch.stack([g.float().square().mean() for g in grads]).cpu()
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return total / len(records)


def error_table(base: Switchable, felt: Tensor | None = None
                ) -> tuple[tuple[Format, ...], Tensor]:
    """Formats worth choosing from, and each layer's squared error in each, (layers, formats).

    With `felt`, (layers,) from `sensitivities`, the error is weighed by its effect on the loss.
    """
    errors = format_errors(base, best_formats())
    return best_formats(), errors if felt is None else errors * felt[:, None]


def format_errors(base: Switchable, formats: Sequence[Format]) -> Tensor:
    """(layers, formats): squared error of each layer in each format, from a sample of blocks.

    Samples of all layers, each divided by its root mean square, are quantised together.
    """
    samples, energy = [], []
    count = min(SAMPLE, *(size // 64 * 64 for size in base.layers.sizes))
    for index in range(len(base.layers.sizes)):
        weight = base.weight(index).reshape(-1)
        energy.append(weight.square().sum())
        blocks = weight[: weight.numel() // 64 * 64].view(-1, 64)
        part = blocks[:: weight.numel() // count].reshape(-1)[:count]
        # The floor keeps a layer of zeros from becoming NaN.
        samples.append(part / part.square().mean().sqrt().clamp(min=1e-30))
    stacked = torch.stack(samples)
    relative = [(round_trip(stacked, fmt) - stacked).square().mean(1) for fmt in formats]
    return torch.stack(relative, 1) * torch.stack(energy)[:, None]


def greedy_configuration(layers: Layers, budget: float, formats: Sequence[Format],
                         errors: Tensor) -> Configuration:
    """Spend bits where one more saves most squared error, up to the budget.

    `formats` and `errors` are from `error_table`, formats ascending in bits.
    """
    costs = torch.tensor([fmt.bits_per_parameter for fmt in formats])
    require(budget >= costs[0], f"{budget} bits a weight are below the cheapest format, "
            f"{costs[0]:.2f}")
    sizes = torch.tensor(layers.sizes)
    chosen = spend(errors, costs * sizes[:, None], budget * float(sizes.sum()))
    return Configuration(layers, tuple(formats[i] for i in chosen))


def spend(errors: Tensor, costs: Tensor, budget: float) -> list[int]:
    """The column for each row that makes errors fall most for what the budget buys.

    `errors` and `costs` are (rows, columns), costs ascending along each row. Every row starts
    at its first column. Each move takes the row and the later column whose error falls most for
    the cost. Gains fall along a row's lower convex hull, so moves are sorted by gain.
    """
    moves = []
    for row, (error, cost) in enumerate(zip(errors.tolist(), costs.tolist(), strict=True)):
        for at, to in itertools.pairwise(_lower_hull(error, cost)):
            price = cost[to] - cost[at]
            moves.append(((error[at] - error[to]) / price, row, to, price))
    chosen, stuck = [0] * len(errors), set()
    left = budget - float(costs[:, 0].sum())
    for _, row, to, price in sorted(moves, key=lambda move: -move[0]):
        if price > left:
            stuck.add(row)  # its later moves build on this one
        elif row not in stuck:
            chosen[row], left = to, left - price
    return chosen
