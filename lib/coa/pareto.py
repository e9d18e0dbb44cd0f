"""The Pareto search over two objectives that pull apart, both to be minimised: bits and loss.
Points are rows (bits a weight, ln loss). A Gaussian process predicts it, not from the 1,050
fields of a configuration but from each layer's squared error times its sensitivity."""

import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct, Matern, WhiteKernel
from torch import Tensor

from lib.base.model import MODULE_KINDS
from lib.coa.configuration import Switchable, best_formats, block_and_kind, format_errors, spend
from lib.errors import require
from lib.quantize.formats import FAMILIES, GRIDS

SEGMENTS, LOW, HIGH = 40, 2.25, 7.25  # the paper's, bits a weight
DEPTHS = 6
STARTS, STEPS, TOGETHER = 5, 6, 32  # climbs a round, steps a climb, most layers changed in a step
COVER = 2  # candidates of a round that go to segments without a point
Evaluate = Callable[[Tensor], float]  # the loss of a configuration, (layers,) format numbers
Journal = dict[tuple[int, ...], float]  # the losses of all evaluated configurations


def non_dominated(points: Tensor) -> Tensor:
    """Rows that no other row beats, being as small in both and smaller in one; (n,) bool."""
    left, right = points[:, None], points[None]
    return ~((left <= right).all(2) & (left < right).any(2)).any(0)


def front(points: Tensor) -> Tensor:
    """The non-dominated rows without duplicates, bits ascending and loss descending."""
    return points[non_dominated(points)].unique(dim=0)


def hypervolume(points: Tensor, reference: Tensor) -> float:
    """Exact area that `points` dominate, within a worse `reference` (Zitzler, Thiele 1999)."""
    inside = front(points[(points < reference).all(1)].double())
    if not len(inside):
        return 0.0
    right = torch.cat([inside[1:, 0], reference[:1].double()])
    return float(((right - inside[:, 0]) * (reference[1] - inside[:, 1])).sum())


def segment(bits: Tensor) -> Tensor:
    """The segment of each number of bits: 40 equal ones from 2.25 to 7.25, ends open."""
    return ((bits - LOW) / (HIGH - LOW) * SEGMENTS).floor().long().clamp(0, SEGMENTS - 1)


def front_by_segment(points: Tensor) -> list[int]:
    """Indices of rows not dominated within their own segment, so that all stay covered."""
    where, rows = segment(points[:, 0]), torch.arange(len(points))
    return sorted(int(i) for part in where.unique()
                  for i in rows[where == part][non_dominated(points[where == part])])


def expected_improvement(bits: Tensor, mean: Tensor, spread: Tensor, points: Tensor,
                         reference: Tensor) -> Tensor:
    """Expected hypervolume improvement of candidates whose bits are known exactly, (n,).
    Only the loss is uncertain, y ~ N(mean, spread^2). With f(b) the least loss among the points
    of at most b bits, a candidate of c bits gains int_c^R max(0, f(b) - y) db. As f is constant
    between the front's points, E = sum_i width_i(c) * EI(f_i), EI(f) = (f - mean) Phi(z) +
    spread phi(z), z = (f - mean) / spread (Emmerich et al. 2011, with one objective exact).
    `bits`, `mean` and `spread` (above 0) are (n,), `points` (m, 2), `reference` (2,)."""
    inside = front(points[(points < reference).all(1)])
    left = torch.cat([torch.tensor([-torch.inf], dtype=inside.dtype), inside[:, 0]])
    right = torch.cat([inside[:, 0], reference[:1]])
    least = torch.cat([reference[1:], inside[:, 1]])
    width = (right - torch.maximum(left, bits[:, None])).clamp(min=0)
    gap = least - mean[:, None]
    z = gap / spread[:, None]
    phi = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
    gain = gap * torch.special.ndtr(z) + spread[:, None] * phi
    return (width * gain.clamp(min=0)).sum(1)


@dataclass(frozen=True)
class Features:
    """Inputs of the surrogate: noise in all, by module kind, and by depth, summed over layers."""

    noise: Tensor  # (layers, formats) float64: sensitivity * squared error of a layer in a format
    cost: Tensor  # (layers, formats) float64: a layer's bits in a format over the weights of all
    groups: Tensor  # (layers, features) 0 or 1: the sums that a layer belongs to
    family: str = "nf"

    @classmethod
    def of(cls, base: Switchable, sensitivity: Tensor, family: str = "nf") -> "Features":
        """Features of a model, given the sensitivity of each of its layers."""
        places = [block_and_kind(name) for name in base.layers.names]
        blocks, kinds = 1 + max(block for block, _ in places), len(MODULE_KINDS)
        groups = torch.zeros(len(places), 1 + kinds + DEPTHS)
        for row, (block, kind) in zip(groups, places, strict=True):
            depth = block * DEPTHS // blocks
            row[[0, 1 + MODULE_KINDS.index(kind), 1 + kinds + depth]] = 1
        sizes = torch.tensor(base.layers.sizes, dtype=torch.float64)
        formats = FAMILIES[family]
        bits = torch.tensor([fmt.bits_per_parameter for fmt in formats], dtype=torch.float64)
        return cls((sensitivity[:, None] * format_errors(base, formats)).double(),
                   bits * (sizes / sizes.sum())[:, None], groups[:, groups.any(0)].double(), family)

    def sums(self, configurations: Tensor) -> Tensor:
        """(n, layers) format numbers to (n, features) sums of noise."""
        return self.noise[torch.arange(len(self.noise)), configurations] @ self.groups

    def bits(self, configurations: Tensor) -> Tensor:
        """(n, layers) format numbers to (n,) bits a weight, exact."""
        return self.cost[torch.arange(len(self.cost)), configurations].sum(1)


class Surrogate:
    """Gaussian process of the logarithm of the loss, on (n, features) sums of noise.
    Matern 5/2 on standardised features for the curvature, a linear term for the trend, white
    noise. The hyper-parameters are fitted from several starts."""

    def __init__(self, sums: Tensor, logs: Tensor, *, starts: int = 3, seed: int = 0) -> None:
        # Its own kernel: if two processes shared one, the second fit would overwrite the first.
        kernel = (ConstantKernel(1.0) * Matern(3.0, (0.1, 100.0), nu=2.5) + ConstantKernel(1.0)
                  * DotProduct(1.0, (0.01, 100.0)) + WhiteKernel(0.01, (1e-6, 1.0)))
        self.process = GaussianProcessRegressor(
            kernel, normalize_y=True, n_restarts_optimizer=starts - 1, random_state=seed)
        inputs = sums.log()
        self.middle, self.scale = inputs.mean(0), inputs.std(0).clamp(min=1e-6)
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            self.process.fit(((inputs - self.middle) / self.scale).double().numpy(),
                             logs.double().numpy())

    def predict(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the logarithm of the loss, (n,) each, float64."""
        inputs = ((sums.log() - self.middle) / self.scale).double().numpy()
        mean, spread = self.process.predict(inputs, return_std=True)
        return torch.from_numpy(mean), torch.from_numpy(spread)


@dataclass
class Evaluated:
    """Everything that a search has evaluated, in order."""

    configurations: Tensor  # (n, layers) format numbers
    points: Tensor  # (n, 2) float64: bits a weight, logarithm of the loss

    @classmethod
    def at(cls, configurations: Tensor, features: Features, evaluate: Evaluate,
           journal: Journal) -> "Evaluated":
        """Evaluate configurations, each one that the journal does not know."""
        bits, logs = features.bits(configurations), []
        for configuration, b in zip(configurations, bits, strict=True):
            numbers = tuple(configuration.tolist())
            if numbers not in journal:
                loss = float(evaluate(configuration))
                require(math.isfinite(loss) and loss > 0, f"the loss of a configuration at {b:.3f} "
                        f"bits is {loss}: a search needs a finite loss above 0")
                journal[numbers] = loss
            logs.append(math.log(journal[numbers]))
        return cls(configurations, torch.stack([bits, torch.tensor(logs, dtype=torch.float64)], 1))

    def __add__(self, other: "Evaluated") -> "Evaluated":
        return Evaluated(torch.cat([self.configurations, other.configurations]),
                         torch.cat([self.points, other.points]))


def reference_point(points: Tensor) -> Tensor:
    """8.6 bits, or more where a configuration takes more, and 1.1 times the worst loss."""
    return torch.stack([torch.clamp(points[:, 0].max() + 0.1, min=8.6),
                        points[:, 1].max() + math.log(1.1)])


def search(start: Evaluated, features: Features, evaluate: Evaluate, *, evaluations: int,
           batch: int = 5, seed: int = 0, journal: Journal | None = None) -> Evaluated:
    """Add evaluations to a starting set, in rounds of `batch`."""
    rng, journal = random.Random(seed), Journal() if journal is None else journal
    evaluated, reference = start, reference_point(start.points)
    total = len(start.configurations) + evaluations
    while (left := total - len(evaluated.configurations)) > 0:
        sums = features.sums(evaluated.configurations)
        candidates = propose(
            evaluated, features, Surrogate(sums, evaluated.points[:, 1], seed=seed), reference,
            count=min(batch, left), rng=rng)
        if not len(candidates):
            break  # the climbs pass only known configurations
        evaluated = evaluated + Evaluated.at(candidates, features, evaluate, journal)
    return evaluated


def propose(evaluated: Evaluated, features: Features, surrogate: Surrogate, reference: Tensor, *,
            count: int, rng: random.Random) -> Tensor:
    """(count, layers): the candidates of highest expected improvement, each given those before.
    The climbs start from random points of the front. A chosen candidate counts at its expected
    loss when the next is chosen (kriging believer). The first ones go to empty segments."""
    def acquire(bits: Tensor, sums: Tensor) -> Tensor:
        return expected_improvement(bits, *surrogate.predict(sums), evaluated.points, reference)

    points, rows = evaluated.points, front_by_segment(evaluated.points)
    candidates = [passed for row in rng.sample(rows, min(STARTS, len(rows)))
                  for passed in climb(evaluated.configurations[row], features, acquire)]
    candidates += fillers(features, points)
    known = {tuple(row) for row in evaluated.configurations.tolist()}
    unique = dict.fromkeys(tuple(candidate.tolist()) for candidate in candidates)
    pool = torch.tensor([row for row in unique if row not in known], dtype=torch.long)
    if not len(pool):
        return evaluated.configurations[:0]
    bits, (mean, spread) = features.bits(pool), surrogate.predict(features.sums(pool))
    chosen: list[int] = []
    for turn in range(min(count, len(pool))):
        gain = expected_improvement(bits, mean, spread, points, reference)
        if turn < COVER:  # gains are far below 1e9, so filling a segment comes first
            gain += 1e9 * ~torch.isin(segment(bits), segment(points[:, 0]))
        gain[chosen] = -1.0
        chosen.append(best := int(gain.argmax()))
        points = torch.cat([points, torch.stack([bits[best], mean[best]])[None]])
    return pool[chosen]


def fillers(features: Features, points: Tensor) -> list[Tensor]:
    """For each segment without a point, the configuration that greedy spending gives."""
    family, best = FAMILIES[features.family], best_formats(features.family)
    columns = torch.tensor([family.index(fmt) for fmt in best])
    empty = set(range(SEGMENTS)) - set(segment(points[:, 0]).tolist())
    noise, cost = features.noise[:, columns], features.cost[:, columns]
    middles = (LOW + (i + 0.5) * (HIGH - LOW) / SEGMENTS for i in sorted(empty))
    return [columns[spend(noise, cost, middle)] for middle in middles]


def climb(configuration: Tensor, features: Features, acquire: Callable[[Tensor, Tensor], Tensor],
          *, steps: int = STEPS) -> list[Tensor]:
    """The configurations passed on the way up the finite differences of the acquisition.
    Each step takes the gain of every neighbour, and applies the best change of each of the most
    promising layers together, and of fewer and fewer layers if that gains nothing.
    `acquire` takes (n,) bits and (n, features) sums of noise."""
    passed = []
    bits, sums = features.bits(configuration[None]), features.sums(configuration[None])
    value = acquire(bits, sums)
    for _ in range(steps):
        layer, new = neighbours(configuration, features)
        old = configuration[layer]
        noise = features.noise[layer, new] - features.noise[layer, old]
        gain = acquire(bits + features.cost[layer, new] - features.cost[layer, old],
                       sums + noise[:, None] * features.groups[layer]) - value
        best: dict[int, int] = {}  # layer to format number, most promising layer first
        for i in gain.argsort(descending=True)[: int((gain > 0).sum())].tolist():
            best.setdefault(int(layer[i]), int(new[i]))
        changes, trials = list(best.items())[:TOGETHER], []
        while changes:
            trial = configuration.clone()
            for index, number in changes:
                trial[index] = number
            trials.append(trial)
            changes = changes[: len(changes) // 2]
        if not trials:
            break
        stacked = torch.stack(trials)
        values = acquire(features.bits(stacked), features.sums(stacked))
        if values.max() <= value:
            break
        value, configuration = values.max(), stacked[int(values.argmax())]
        bits, sums = features.bits(configuration[None]), features.sums(configuration[None])
        passed.append(configuration)
    return passed


def neighbours(configuration: Tensor, features: Features) -> tuple[Tensor, Tensor]:
    """(layer, new format number) of every change of one field by one place up or down its list.
    A category goes to every other one. Numbers count fields as itertools.product does."""
    layers, numbers, stride = [], [], features.noise.shape[1]
    for name, values in GRIDS[features.family].items():
        stride //= (count := len(values))
        at = configuration // stride % count
        reach = count - 1 if name in ("scale_dtype", "type") else 1
        for move in (*range(-reach, 0), *range(1, reach + 1)):
            fits = ((at + move >= 0) & (at + move < count)).nonzero()[:, 0]
            layers.append(fits)
            numbers.append(configuration[fits] + move * stride)
    return torch.cat(layers), torch.cat(numbers)
