"""NormalFloat with one or two levels of scales (Dettmers et al. 2023, QLoRA, section 3)."""

import functools
from dataclasses import dataclass
from statistics import NormalDist

import gguf
import torch
from torch import Tensor

from lib.configuration import Level
from lib.errors import require

# Probability mass left outside the outermost quantiles, as in QLoRA's table.
TAIL = 0.9677083
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GRIDS = ("nf", "int")
# Numbers worked on at a time, so that what is in between stays in the cache.
CHUNK = 1 << 16


@functools.cache
def normal_float(bits: int) -> Tensor:
    """Codebook of 2^bits levels in [-1, 1], float32, ascending.

    Quantiles of N(0, 1) at evenly spaced probabilities: 2^(bits-1) above zero,
    2^(bits-1) - 1 below, and zero itself; divided by the largest.

    Raises:
        UserError: bits below 2 or above 8.
    """
    require(2 <= bits <= 8, f"{bits} bits: NormalFloat is defined here for 2 to 8")
    half = 2 ** (bits - 1)
    above = _quantiles(half)
    below = [-q for q in _quantiles(half - 1)]
    levels = torch.tensor(sorted([*below, 0.0, *above]), dtype=torch.float64)
    return (levels / levels.max()).float()


def _quantiles(count: int) -> list[float]:
    """`count` normal quantiles between TAIL and 0.5, without 0.5 itself."""
    step = (TAIL - 0.5) / count
    return [NormalDist().inv_cdf(TAIL - i * step) for i in range(count)]


@functools.cache
def codebook(grid: str, bits: int) -> Tensor:
    """Levels of a grid in [-1, 1]: "nf", NormalFloat; "int", whole numbers -m to m over m.

    The integers are symmetric, m = 2^(bits-1) - 1, so one code stays unused.
    """
    require(grid in GRIDS, f"unknown grid {grid!r}: use {' or '.join(GRIDS)}")
    if grid == "nf":
        return normal_float(bits)
    top = 2 ** (bits - 1) - 1
    return torch.arange(-top, top + 1) / top


def quantize_blocks(weight: Tensor, codebook: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Nearest codebook entry of each weight, scaled by its block's absmax.

    Args:
        weight: any shape; flattened row by row. The last block may be short.
        codebook: (levels,), ascending, within [-1, 1].
        block: weights that share one scale.

    Returns:
        codes (n,) uint8 and absmax (ceil(n / block),) float32.
    """
    blocks = _blocks(weight, block)
    absmax = blocks.abs().amax(1)
    return _codes(blocks, absmax, codebook)[: weight.numel()], absmax


def _blocks(values: Tensor, block: int) -> Tensor:
    """(ceil(n / block), block) float32, the last one filled up with zeros."""
    require(block > 0, f"block size {block}: use a positive whole number")
    flat = values.detach().float().reshape(-1)
    if short := -flat.numel() % block:
        flat = torch.nn.functional.pad(flat, (0, short))
    return flat.view(-1, block)


def _codes(blocks: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """Nearest level of each number over its block's scale, flat, uint8."""
    # A block of scale 0 decodes to zeros, whatever its codes are.
    scales = torch.where(scales != 0, scales, 1.0)[:, None]
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=blocks.device)
    rows = max(1, CHUNK // blocks.shape[1])
    for part, scale, out in zip(blocks.split(rows), scales.split(rows), codes.split(rows),
                                strict=True):
        out.copy_(nearest((part / scale).view(-1), levels).view(out.shape))
    return codes.view(-1)


def nearest(numbers: Tensor, levels: Tensor) -> Tensor:
    """Index (n,) int32 of the level nearest to each number; of two, the lower one.

    A search by halves costs a CPU a wrong guess at nearly every step. So the
    range is cut into cells with at most one middle between levels each: the
    cell says how many middles lie below, and one comparison says the rest.
    """
    cells, below, middles = _cells(tuple(levels.tolist()))
    # Rounding keeps order: a number in a higher cell than a middle is above it.
    cell = _cell(numbers, cells)
    return below.index_select(0, cell) + (numbers > middles.index_select(0, cell))


def _cell(numbers: Tensor, cells: int) -> Tensor:
    return torch.add(cells, numbers, alpha=cells).clamp_(0, 2 * cells).int()


@functools.lru_cache(maxsize=32)
def _cells(levels: tuple[float, ...]) -> tuple[int, Tensor, Tensor]:
    """Half the number of cells, middles below each cell, and the middle inside it."""
    values = torch.tensor(levels)
    middles = (values[1:] + values[:-1]) / 2
    cells = 64
    while len((places := _cell(middles, cells)).unique()) < len(middles):
        cells *= 2
    inside = torch.full((2 * cells + 1,), float("inf"))
    inside[places] = middles
    counts = torch.bincount(places, minlength=2 * cells + 1)
    return cells, (counts.cumsum(0) - counts).int(), inside


def dequantize_blocks(codes: Tensor, absmax: Tensor, codebook: Tensor, block: int) -> Tensor:
    """(n,) float32 weights: codebook[code] * absmax of the block."""
    values = codebook.to(codes.device).index_select(0, codes.int())
    whole = values.numel() // block * block
    values[:whole].view(-1, block).mul_(absmax[: whole // block, None])
    if whole < values.numel():
        values[whole:] *= absmax[-1]
    return values


def bits_per_parameter(
    bits: int, block: int, *, scale_bits: int = 32, scale_block: int = 0
) -> float:
    """Storage of one weight: bits + scale_bits / block, plus second-level scales.

    With double quantisation (`scale_block` > 0) each group of that many scales
    shares one float32: NF4 with blocks of 64, 8-bit scales in groups of 256
    takes 4 + 8/64 + 32/(64 * 256) = 4.127 bits.
    """
    second = 32 / (block * scale_block) if scale_block else 0.0
    return bits + scale_bits / block + second


@dataclass(frozen=True)
class Quantized:
    """A weight in codes and scales of two levels.

    Attributes:
        codes: (n,) uint8, of the weights.
        scale_codes: (ceil(n / block),) uint8, of the scales.
        group_scales: (ceil(blocks / group),) in the level's dtype.
        mean: () float32, of the scales.
    """

    level: Level
    grid: str
    codes: Tensor
    scale_codes: Tensor
    group_scales: Tensor
    mean: Tensor

    @property
    def scales(self) -> Tensor:
        """(blocks,) float32: mean + level of the scale's code * scale of its group."""
        book = codebook(self.grid, self.level.scale_bits)
        return self.mean + dequantize_blocks(
            self.scale_codes, self.group_scales.float(), book, self.level.group)


def quantize(weight: Tensor, level: Level, grid: str = "nf") -> Quantized:
    """Quantise twice: the weights by their blocks' scales, the scales by groups.

    The scales, less their mean, are coded with the b0-bit codebook. This is
    where it differs from bitsandbytes, which codes them with a map of 8-bit
    floats. The weights are coded last, by the scales that decoding will give.

    Args:
        weight: any shape, flattened row by row.

    Raises:
        UserError: a weight that is not finite.
    """
    blocks = _blocks(weight, level.block)
    absmax = blocks.abs().amax(1)
    # absmax is finite only if each weight of the block is.
    require(absmax.isfinite().all(), "a weight is not a finite number: "
            "the model is damaged, take it anew")
    mean = absmax.mean()
    groups = _blocks(absmax - mean, level.group)
    # The groups' padding is zero, which never is the largest.
    tops = groups.abs().amax(1).to(DTYPES[level.scale_dtype])
    require(tops.isfinite().all(), f"a scale is too large for {level.scale_dtype}")
    codes = _codes(groups, tops.float(), codebook(grid, level.scale_bits))[: absmax.numel()]
    whole = Quantized(level, grid, codes, codes, tops, mean)
    weight_codes = _codes(blocks, whole.scales, codebook(grid, level.bits))
    return Quantized(level, grid, weight_codes[: weight.numel()], codes, tops, mean)


def dequantize(packed: Quantized) -> Tensor:
    """(n,) float32: level of the weight's code * scale of its block."""
    book = codebook(packed.grid, packed.level.bits)
    return dequantize_blocks(packed.codes, packed.scales, book, packed.level.block)


def rounded(weight: Tensor, how: Level | str, grid: str = "nf") -> Tensor:
    """The weight as it comes back from storage, same shape, float32.

    Args:
        how: a level, or a block type of GGUF such as "Q4_0" (a symmetric
            integer grid with one float16 scale for 32 weights).
    """
    if isinstance(how, Level):
        return dequantize(quantize(weight, how, grid)).view(weight.shape)
    kind = gguf.GGMLQuantizationType[how]
    data = gguf.quants.quantize(weight.detach().float().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(data, kind))
