"""Configurations (Ye, Tang, Ngai, arXiv 2509.25214, section 3): a model that changes them, and
mixtures of formats for a budget of bits, at random or greedily by quantisation error."""

import functools
import hashlib
import itertools
import math
import random
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.base.embedded import EMBEDDED
from lib.base.model import MODULE_KINDS, best_dtype, load_model, load_tokenizer, pad_right
from lib.base.records import Record, encode
from lib.errors import UserError, require
from lib.evaluate.scores import answer_loss
from lib.files import MANIFEST, read_json, sha256
from lib.quantize.formats import FAMILIES, GRID, GRIDS, Format, GgufFormat, round_trip

SPANS = {"nf": (2.25, 7.25), "gguf": (4.4, 8.4)}  # bits of training sets; of nf the paper's
AnyFormat = Format | GgufFormat
FORMAT_NUMBERS = {fmt: i for formats in FAMILIES.values() for i, fmt in enumerate(formats)}


def block_and_kind(name: str) -> tuple[int, str]:
    """(block position, module kind) of a linear layer, from its name in a Llama model."""
    match = re.search(r"(?:^|\.)layers\.(\d+)\..*?([a-z]+_proj)$", name)
    require(match and match[2] in MODULE_KINDS, f"{name} is not a linear layer of a Llama block")
    return int(match[1]), match[2]


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a model's blocks by name, in order."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.split(".")[-1] in MODULE_KINDS}


@dataclass(frozen=True)
class Layers:
    """Names and sizes (weights) of the layers that a configuration describes."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "Layers":
        """The linear layers of a model's blocks."""
        linears = block_linears(model)
        others = [name for name, module in model.named_modules() if ".layers." in f".{name}"
                  and isinstance(module, nn.Linear) and name not in linears]
        require(linears and not others and all(type(m) is nn.Linear for m in linears.values()),
                "the model has no Llama blocks, or other layers in them, or is quantised: use "
                "the original of one of that family")
        return cls(tuple(linears), tuple(m.weight.numel() for m in linears.values()))

    def require_same(self, other: "Layers") -> None:
        """UserError unless `other` has the same layers."""
        require(self == other, f"the configuration is for another model, with other layers "
                f"({len(other.names)} instead of {len(self.names)}), sizes or names")


@dataclass(frozen=True)
class Configuration:
    """One format for each layer, all of one family."""

    layers: Layers
    formats: tuple[AnyFormat, ...]

    def __post_init__(self) -> None:
        require(len(self.formats) == len(self.layers.names),
                f"{len(self.formats)} formats for {len(self.layers.names)} layers: give one each")
        require(len({*map(type, self.formats)}) == 1, "NormalFloat and GGUF types in one "
                "configuration, which no file holds: use one of them")

    @property
    def family(self) -> str:
        """"nf", NormalFloat, or "gguf", llama.cpp's types."""
        return "nf" if isinstance(self.formats[0], Format) else "gguf"

    @classmethod
    def uniform(cls, layers: Layers, fmt: AnyFormat) -> "Configuration":
        """The same format for every layer."""
        return cls(layers, (fmt,) * len(layers.names))

    @functools.cached_property
    def bits(self) -> float:
        """Bits per parameter of the layers, by the formula."""
        pairs = zip(self.formats, self.layers.sizes, strict=True)
        return sum(fmt.bits_per_parameter * n for fmt, n in pairs) / sum(self.layers.sizes)

    @functools.cached_property
    def indices(self) -> list[list[int]]:
        """For each layer, the positions of its format's fields in the family's grid."""
        sizes = [*map(len, GRIDS[self.family].values())]
        return torch.stack(torch.unravel_index(self.numbers, sizes), 1).tolist()

    @property
    def bytes(self) -> int:
        """Bytes of the packed codes and scales of all layers."""
        pairs = zip(self.formats, self.layers.sizes, strict=True)
        return sum(-(-fmt.storage_bits(size) // 8) for fmt, size in pairs)

    def __str__(self) -> str:
        counts = sorted(Counter(map(str, self.formats)).items())
        spread = ", ".join(f"{count} in {kind}" for kind, count in counts)
        return f"{self.bits:.2f} bits a weight, {self.bytes / 1e6:.1f} MB: {spread}"

    @property
    def numbers(self) -> Tensor:
        """(layers,): each format's position in its family, as the search handles it."""
        return torch.tensor([FORMAT_NUMBERS[fmt] for fmt in self.formats])

    def to_json(self) -> dict[str, Any]:
        """{"bits": ..., "layers": {name: [b, b0, b1, B0, B1], or a GGUF type}}."""
        values = ([*astuple(fmt)] if isinstance(fmt, Format) else fmt for fmt in self.formats)
        layers = dict(zip(self.layers.names, values, strict=True))
        return {"bits": round(self.bits, 4), "layers": layers}

    @classmethod
    def from_json(cls, data: Any, layers: Layers) -> "Configuration":
        """The configuration that `to_json` wrote; UserError unless it fits these layers."""
        values = data.get("layers") if isinstance(data, Mapping) else None
        require(isinstance(values, Mapping) and {*data} <= {"bits", "layers"},
                'a configuration is {"layers": {name: [b, b0, b1, B0, B1] or a GGUF type}}')
        for name in (*layers.names, *values):
            require(name in values, f"the configuration lacks {name}: it is for another model")
            require(name in layers.names, f"this model has no layer {name}: it is for another one")
        formats: list[AnyFormat] = []
        for name in layers.names:
            try:
                formats.append(GgufFormat(values[name]) if values[name] in FAMILIES["gguf"] else
                               Format(**dict(zip(GRID, values[name], strict=True))))
            except (UserError, TypeError, ValueError) as error:
                raise UserError(f"{name}: {values[name]!r} is not [b, b0, b1, B0, B1] ({error}), "
                                f"nor one of {', '.join(FAMILIES['gguf'])}") from None
        return cls(layers, tuple(formats))


class Switchable:
    """A model, its original weights, and a cache of its layers in other formats.
    A layer's weight points to the dequantised tensor of its format, built from the file's
    float16 weights; cached ones, up to `cache_mb` MB, are shared, so nothing may write into
    them. `configuration` is None for the original weights."""

    def __init__(self, model: PreTrainedModel, *, cache_mb: float = 512,
                 dtype: torch.dtype | None = None, name: str = EMBEDDED) -> None:
        self.layers = Layers.of(model)
        self._linears = tuple(block_linears(model).values())
        self._originals = tuple(m.weight.data.cpu() for m in self._linears)
        self.model = model.to(dtype or best_dtype())
        self.cache_mb, self.name = cache_mb, name
        self.configuration: Configuration | None = None
        self._cache: OrderedDict[tuple[int, Format], Tensor] = OrderedDict()
        for linear in self._linears:
            linear.weight.requires_grad_(False)

    @classmethod
    def load(cls, model: str = EMBEDDED, **options: object) -> "Switchable":
        """A model by name; `options` as in the class."""
        # In the file's own precision, so that nothing is rounded twice.
        return cls(load_model(model, dtype=torch.float16), name=model, **options)

    def switch(self, configuration: Configuration) -> None:
        """Point every layer to its weight in the configuration's format."""
        self.layers.require_same(configuration.layers)
        try:
            # All are built before the first is set: a failure leaves the model as it was.
            self.point([self._cached(i, fmt) for i, fmt in enumerate(configuration.formats)])
            self.configuration = configuration
        finally:
            while sum(tensor.nbytes for tensor in self._cache.values()) > 1e6 * self.cache_mb:
                self._cache.popitem(last=False)

    def point(self, weights: Sequence[Tensor]) -> None:
        """Point every layer to a weight, in the model's dtype."""
        for linear, weight in zip(self._linears, weights, strict=True):
            linear.weight.data = weight.to(linear.weight)

    def restore(self) -> None:
        """Point every layer to a copy of its original weight."""
        self.point([w.to(self.model.dtype, copy=True) for w in self._originals])
        self.configuration = None

    def weight(self, index: int, fmt: Format | None = None) -> Tensor:
        """A layer's original weight, or that weight as a format gives it back, in float32."""
        if fmt is None:
            return self._originals[index].float()
        try:
            return round_trip(self._originals[index], fmt)
        except UserError as error:
            raise UserError(f"{self.layers.names[index]}: {error}") from None

    def _cached(self, index: int, fmt: Format) -> Tensor:
        if (key := (index, fmt)) not in self._cache:
            self._cache[key] = self.weight(index, fmt).to(self._linears[index].weight)
        self._cache.move_to_end(key)
        return self._cache[key]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the layers' names and of every 101st original weight."""
        digest = hashlib.sha256()
        for name, weight in zip(self.layers.names, self._originals, strict=True):
            sample = weight.float().reshape(-1)[::101].contiguous()
            digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.numpy().tobytes())
        return digest.hexdigest()

    def training_set(self, records: Sequence[Record], family: str = "nf", *, count: int = 50,
                     seed: int = 0, **options: Any) -> list[Configuration]:
        """Configurations spread over the budgets, random and greedy ones in turn.
        Those with more noise than the cheapest greedy one, which has fewer bits, are left out:
        they are useless, and steps on them do harm. `options` are those of `sensitivities`."""
        formats, best = FAMILIES[family], best_formats(family)
        noise = format_errors(self, formats) * sensitivities(self, records, **options)[:, None]
        columns, every = [FORMAT_NUMBERS[fmt] for fmt in best], list[Configuration]()
        rng, (low, high) = random.Random(seed), SPANS[family]
        for i in range(count // 2):
            budget = low + (high - low) * (i + 0.5) / (count // 2)
            every += [random_configuration(self.layers, budget, rng, family),
                      greedy_configuration(self.layers, budget, best, noise[:, columns])]
        sums = [float(noise[range(len(noise)), c.numbers].sum()) for c in every]
        return [c for c, own in zip(every, sums, strict=True) if own <= sums[1]]


def random_configuration(layers: Layers, budget: float, rng: random.Random,
                         family: str = "nf") -> Configuration:
    """Random formats of a family whose bits a weight are within 0.05 of the budget.
    They are drawn in proportion to exp(t * bits), where t moves until the sum fits."""
    formats, t = FAMILIES[family], 0.0
    costs = [fmt.bits_per_parameter for fmt in formats]
    require(min(costs) < budget < max(costs),
            f"{budget} bits a weight: use {min(costs):.2f} to {max(costs):.2f}")
    for _ in range(2000):
        weights = [math.exp(t * (cost - budget)) for cost in costs]
        found = Configuration(layers, tuple(rng.choices(formats, weights, k=len(layers.names))))
        if abs(found.bits - budget) <= 0.05:
            return found
        t = min(20.0, max(-20.0, t + (budget - found.bits) / 4))
    raise UserError(f"found no mixture of formats at {budget} bits a weight: choose another budget")


@functools.cache
def best_formats(family: str = "nf") -> tuple[AnyFormat, ...]:
    """All GGUF types; of NormalFloat the lower convex hull of error over bits. Costs ascend."""
    if family == "gguf":
        return FAMILIES[family]
    weight = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    rows = sorted((fmt.bits_per_parameter, float((round_trip(weight, fmt) - weight).square().sum()),
                   number) for number, fmt in enumerate(FAMILIES[family]))
    costs, errors, positions = zip(*rows, strict=True)
    return tuple(FAMILIES[family][positions[i]] for i in _lower_hull(errors, costs))


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


def sensitivities(base: Switchable, records: Sequence[Record], *, tokenizer: Any = None,
                  learn: str = "all") -> Tensor:
    """(layers,): mean squared gradient of an example's loss by a layer's weights, per weight.
    Noise of energy e, spread evenly over n weights, moves the loss by about |g| sqrt(e / n);
    the square of that is sensitivity times energy."""
    tokenizer = tokenizer or load_tokenizer(base.name)
    weights = [base.model.get_submodule(name).weight for name in base.layers.names]
    total = torch.zeros(len(weights))
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for record in records:
            pair = pad_right([encode(tokenizer, record, learn=learn)], 0)
            loss, tokens = answer_loss(base.model, *(part.to(base.model.device) for part in pair))
            grads = torch.autograd.grad(loss / tokens, weights)
            total += torch.stack([g.float().square().mean() for g in grads]).cpu()
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return total / len(records)


def format_errors(base: Switchable, formats: Sequence[AnyFormat]) -> Tensor:
    """(layers, formats): squared error of each layer in each format, from a sample of blocks."""
    # Samples of all layers, each divided by its root mean square, are quantised together.
    samples, energy, count = [], [], min(4096, *(n // 64 * 64 for n in base.layers.sizes))
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


def greedy_configuration(layers: Layers, budget: float, formats: Sequence[AnyFormat],
                         errors: Tensor) -> Configuration:
    """Spend bits where one saves most squared error; the formats' cost ascends."""
    costs = torch.tensor([fmt.bits_per_parameter for fmt in formats])
    require(budget >= costs[0], f"{budget} bits a weight: use {costs[0]:.2f} or more")
    sizes = torch.tensor(layers.sizes)
    chosen = spend(errors, costs * sizes[:, None], budget * float(sizes.sum()))
    return Configuration(layers, tuple(formats[i] for i in chosen))


def spend(errors: Tensor, costs: Tensor, budget: float) -> list[int]:
    """The column for each row that makes errors fall most for what the budget buys.
    `errors` and `costs` are (rows, columns), costs ascending; every row starts at its first
    column. Moves are sorted by error saved for the cost, which falls along a row's lower hull."""
    moves = []
    for row, (error, cost) in enumerate(zip(errors.tolist(), costs.tolist(), strict=True)):
        for at, to in itertools.pairwise(_lower_hull(error, cost)):
            price = cost[to] - cost[at]
            moves.append(((error[at] - error[to]) / price, row, to, price))
    chosen, stuck, left = [0] * len(errors), set(), budget - float(costs[:, 0].sum())
    for _, row, to, price in sorted(moves, key=lambda move: -move[0]):
        if price > left:
            stuck.add(row)  # its later moves build on this one
        elif row not in stuck:
            chosen[row], left = to, left - price
    return chosen


def known_configurations(adapter: Path, base: Switchable) -> list[tuple[Configuration, float]]:
    """The front of an adapter on its base: (configuration, held-out loss); empty without one."""
    file = adapter / "front.json"
    if not file.is_file():
        return []
    stored = read_json(file)
    try:
        for key, ours in (("base_hash", base.fingerprint), ("adapter", sha256(adapter / MANIFEST))):
            require(stored[key] == ours, f"another {key.removesuffix('_hash')}")
        return [(Configuration.from_json(row["configuration"], base.layers), float(row["loss"]))
                for row in stored["front"]]
    except (UserError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{file} is not this adapter's front ({error}): search again") from None
