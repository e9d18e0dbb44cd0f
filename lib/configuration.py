"""Configurations: how many bits each linear layer of a model's blocks is stored in.

The tuple (b, b0, b1, B0, B1) of a layer is that of CoA-LoRA (Ye, Tang, Ngai,
arXiv 2509.25214, section 3): 432 choices a layer.
"""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from lib.artifacts import read_json, write_json
from lib.errors import UserError, require

# The order is that of a block; attention output and MLP output are kinds of their own.
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GRID: dict[str, tuple[Any, ...]] = {
    "bits": (2, 3, 4, 8), "scale_bits": (2, 3, 4, 8), "scale_dtype": ("bf16", "fp16", "fp32"),
    "block": (16, 32, 64), "group": (16, 64, 256)}
DTYPE_BITS = {"bf16": 16, "fp16": 16, "fp32": 32}


@dataclass(frozen=True)
class Level:
    """How one layer is stored: (b, b0, b1, B0, B1) in the paper's order.

    Attributes:
        bits: b, of a weight's code.
        scale_bits: b0, of a scale's code; `block` weights share a scale.
        scale_dtype: b1, of the second-level scales: bf16, fp16 or fp32.
        block: B0, weights that share one scale.
        group: B1, scales that share one second-level scale.
    """

    bits: int = 4
    scale_bits: int = 8
    scale_dtype: str = "fp32"
    block: int = 64
    group: int = 256

    def __post_init__(self) -> None:
        for name, values in GRID.items():
            value = getattr(self, name)
            require(any(value == v and type(value) is type(v) for v in values),
                    f"{name} is {value!r}: use one of {', '.join(map(str, values))}")

    @property
    def bits_per_parameter(self) -> float:
        """b + b0 / B0 + bits(b1) / (B0 B1): the storage of a weight in a large layer."""
        return (self.bits + self.scale_bits / self.block
                + DTYPE_BITS[self.scale_dtype] / (self.block * self.group))

    def scales(self, count: int) -> tuple[int, int]:
        """First- and second-level scales of `count` weights."""
        blocks = -(-count // self.block)
        return blocks, -(-blocks // self.group)

    def storage_bits(self, count: int) -> int:
        """Bits of a layer of `count` weights, short blocks and groups counted whole.

        The scales' mean adds 32 bits a layer, which the formula leaves out.
        """
        blocks, groups = self.scales(count)
        return (count * self.bits + blocks * self.scale_bits
                + groups * DTYPE_BITS[self.scale_dtype] + 32)

    def as_list(self) -> list[Any]:
        """[b, b0, b1, B0, B1], as in JSON."""
        return [getattr(self, field.name) for field in fields(self)]


LEVELS = tuple(Level(*values) for values in itertools.product(*GRID.values()))


def place(name: str) -> tuple[int, str]:
    """(block position, kind) of a linear layer, from its name in a Llama model.

    Raises:
        UserError: no layer of a block, or none of the seven kinds.
    """
    match = re.search(r"(?:^|\.)layers\.(\d+)\..*?([a-z]+_proj)$", name)
    require(match and match[2] in KINDS, f"{name} is no linear layer of a Llama block")
    return int(match[1]), match[2]


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by name, in order."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.split(".")[-1] in KINDS}


@dataclass(frozen=True)
class Layers:
    """Names and sizes (weights) of the layers that a configuration speaks of."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "Layers":
        linears = block_linears(model)
        require(linears, "the model has no Llama blocks: use a model of that family")
        return cls(tuple(linears), tuple(m.weight.numel() for m in linears.values()))

    def require_same(self, other: "Layers") -> None:
        """UserError, naming the first difference, unless `other` has the same layers."""
        for mine, theirs in itertools.zip_longest(
                zip(self.names, self.sizes, strict=True),
                zip(other.names, other.sizes, strict=True), fillvalue=("no more layers", 0)):
            require(mine == theirs, f"the configuration is for another model: it has "
                    f"{theirs[0]} ({theirs[1]} weights) where this one has "
                    f"{mine[0]} ({mine[1]} weights)")


@dataclass(frozen=True)
class Configuration:
    """One level for each layer."""

    layers: Layers
    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        require(len(self.levels) == len(self.layers.names),
                f"{len(self.levels)} levels for {len(self.layers.names)} layers: give one each")

    @classmethod
    def uniform(cls, layers: Layers, level: Level) -> "Configuration":
        """The same level for every layer."""
        return cls(layers, (level,) * len(layers.names))

    @cached_property
    def bits(self) -> float:
        """Bits per parameter of the layers, by the formula."""
        total = sum(level.bits_per_parameter * size
                    for level, size in zip(self.levels, self.layers.sizes, strict=True))
        return total / sum(self.layers.sizes)

    @cached_property
    def indices(self) -> list[list[int]]:
        """Where each level's five fields stand in the grid."""
        return [[values.index(value) for values, value in
                 zip(GRID.values(), level.as_list(), strict=True)] for level in self.levels]

    @property
    def bytes(self) -> int:
        """Bytes of the packed codes and scales of all layers."""
        return sum(-(-level.storage_bits(size) // 8)
                   for level, size in zip(self.levels, self.layers.sizes, strict=True))

    def __str__(self) -> str:
        counts = Counter(level.bits for level in self.levels)
        spread = ", ".join(f"{counts[b]} in {b} bits" for b in GRID["bits"] if counts[b])
        return f"{self.bits:.2f} bits a weight, {self.bytes / 1e6:.1f} MB: {spread}"

    def grid(self) -> list[list[float]]:
        """Bits per parameter by block (rows) and kind (columns), for a heat map."""
        rows: dict[int, list[float]] = {}
        for name, level in zip(self.layers.names, self.levels, strict=True):
            block, kind = place(name)
            rows.setdefault(block, [0.0] * len(KINDS))[KINDS.index(kind)] = (
                level.bits_per_parameter)
        return [rows[block] for block in sorted(rows)]

    def to_json(self) -> dict[str, Any]:
        """{"bits": ..., "layers": {name: [b, b0, b1, B0, B1]}}."""
        return {"bits": round(self.bits, 4), "layers": {
            name: level.as_list()
            for name, level in zip(self.layers.names, self.levels, strict=True)}}

    @classmethod
    def from_json(cls, data: Any, layers: Layers) -> "Configuration":
        """The configuration of `to_json`, for a model with these layers.

        Raises:
            UserError: a missing or unknown layer, or an illegal value; the
                message names both.
        """
        given = data.get("layers") if isinstance(data, Mapping) else None
        require(isinstance(given, Mapping),
                'a configuration is {"layers": {name: [b, b0, b1, B0, B1]}}')
        missing = [name for name in layers.names if name not in given]
        unknown = [name for name in given if name not in set(layers.names)]
        require(not missing, f"the configuration lacks {_first(missing)}: it is for another model")
        require(not unknown, f"this model has no layer {_first(unknown)}: "
                "the configuration is for another model")
        return cls(layers, tuple(_level(name, given[name]) for name in layers.names))

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path, layers: Layers) -> "Configuration":
        """Read what `save` wrote.

        Raises:
            UserError: no such file, no JSON, or what `from_json` refuses.
        """
        return cls.from_json(read_json(Path(path)), layers)


def _level(name: str, values: Any) -> Level:
    require(isinstance(values, Sequence) and len(values) == len(GRID),
            f"{name} has {values!r}: use [b, b0, b1, B0, B1]")
    try:
        return Level(*values)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _first(names: Sequence[str]) -> str:
    return "".join(names[:1]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
