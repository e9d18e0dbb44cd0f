"""Formats of one matrix: the tuple (b, b0, b1, B0, B1) of CoA-LoRA, and GGUF's types."""

import itertools
from dataclasses import astuple, dataclass
from typing import Any

from lib.errors import require

GRID: dict[str, tuple[Any, ...]] = {
    "bits": (2, 3, 4, 8), "scale_bits": (2, 3, 4, 8), "scale_dtype": ("bf16", "fp16", "fp32"),
    "block": (16, 32, 64), "group": (16, 64, 256)}
DTYPE_BITS = {"bf16": 16, "fp16": 16, "fp32": 32}
# The types that gguf's own quantiser writes, 32 to 4.5 bits a weight.
GGUF_TYPES = ("F32", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


@dataclass(frozen=True)
class Format:
    """How one layer is stored: (b, b0, b1, B0, B1) in the paper's order."""

    bits: int = 4  # b, of a weight's code
    scale_bits: int = 8  # b0, of a scale's code
    scale_dtype: str = "fp32"  # b1, of the second-level scales
    block: int = 64  # B0, weights that share one scale
    group: int = 256  # B1, scales that share one second-level scale

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
        """Bits of `count` weights: the formula on whole blocks and groups, and 32 for the mean."""
        blocks, groups = self.scales(count)
        return (count * self.bits + blocks * self.scale_bits
                + groups * DTYPE_BITS[self.scale_dtype] + 32)

    def as_list(self) -> list[Any]:
        """[b, b0, b1, B0, B1], as in JSON."""
        return [*astuple(self)]


FORMATS = tuple(Format(*values) for values in itertools.product(*GRID.values()))
