"""From a matrix to blocks of codes and back: NormalFloat (QLoRA, section 3) and GGUF's types."""

import functools
from dataclasses import dataclass
from statistics import NormalDist

import gguf
import numpy as np
import torch
from torch import Tensor

from lib.errors import UserError, require
from lib.quantize.formats import GGUF_TYPES, Format

# Probability below the outermost quantile, as in QLoRA's table.
TAIL = 0.9677083
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Weights worked on at a time, so that intermediate results stay in the cache.
CHUNK = 1 << 16


@functools.cache
def normal_float(bits: int) -> Tensor:
    """Codebook of 2^bits quantisation levels in [-1, 1], float32, ascending.

    Quantiles of N(0, 1) at evenly spaced probabilities: 2^(bits-1) above zero,
    2^(bits-1) - 1 below, and zero itself; all divided by the largest.
    """
    require(2 <= bits <= 8, f"{bits} bits: NormalFloat is defined here for 2 to 8")
    half = 2 ** (bits - 1)
    levels = [0.0]
    for count, sign in ((half, 1), (half - 1, -1)):
        step = (TAIL - 0.5) / count
        levels += [sign * NormalDist().inv_cdf(TAIL - i * step) for i in range(count)]
    return (torch.tensor(sorted(levels), dtype=torch.float64) / max(levels)).float()


def quantize_blocks(weight: Tensor, codebook: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Nearest entry of a codebook (levels,), ascending in [-1, 1], scaled by the block's absmax.

    The weight is flattened row by row; the last block may be short.
    Returns codes (n,) uint8 and absmax (ceil(n / block),) float32.
    """
    blocks = _blocks(weight, block)
    absmax = blocks.abs().amax(1)
    return _codes(blocks, absmax, codebook)[: weight.numel()], absmax


def _blocks(values: Tensor, block: int) -> Tensor:
    """(ceil(n / block), block) float32, the last one padded with zeros."""
    require(block > 0, f"block size {block}: use a positive whole number")
    flat = values.detach().float().reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def _codes(blocks: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """Nearest level of each number divided by its block's scale, flat, uint8."""
    scales = torch.where(scales != 0, scales, 1.0)[:, None]  # all codes of a scale 0 give zeros
    rows = max(1, CHUNK // blocks.shape[1])
    return torch.cat([nearest((part / scale).view(-1), levels).byte() for part, scale in
                      zip(blocks.split(rows), scales.split(rows), strict=True)])


def nearest(numbers: Tensor, levels: Tensor) -> Tensor:
    """Index (n,) int32 of the level nearest to each number; of two, the lower one.

    Five times as fast as a binary search: the range is cut into cells with at most one
    midpoint between levels each. A table says how many midpoints lie below a cell, and one
    comparison decides about the midpoint in it.
    """
    cells, below, midpoints = _cells(tuple(levels.tolist()))
    cell = _cell(numbers, cells)
    return below.index_select(0, cell) + (numbers > midpoints.index_select(0, cell))


def _cell(numbers: Tensor, cells: int) -> Tensor:
    # Rounding keeps the order: a number in a higher cell than a midpoint is above it.
    return torch.add(cells, numbers, alpha=cells).clamp_(0, 2 * cells).int()


@functools.lru_cache(maxsize=32)
def _cells(levels: tuple[float, ...]) -> tuple[int, Tensor, Tensor]:
    """Half the number of cells, midpoints below each cell, and the midpoint inside it."""
    values = torch.tensor(levels)
    midpoints = (values[1:] + values[:-1]) / 2
    cells = 64
    while len(_cell(midpoints, cells).unique()) < len(midpoints):
        cells *= 2
    inside = torch.full((2 * cells + 1,), float("inf"))
    inside[_cell(midpoints, cells)] = midpoints
    counts = torch.bincount(_cell(midpoints, cells), minlength=2 * cells + 1)
    return cells, (counts.cumsum(0) - counts).int(), inside


def dequantize_blocks(codes: Tensor, absmax: Tensor, codebook: Tensor, block: int) -> Tensor:
    """(n,) float32 weights: codebook[code] * absmax of the block."""
    values = codebook.to(codes.device).index_select(0, codes.int())
    whole = values.numel() // block * block
    values[:whole].view(-1, block).mul_(absmax[: whole // block, None])
    if whole < values.numel():
        values[whole:] *= absmax[-1]
    return values


def bits_per_parameter(bits: int, block: int, *, scale_bits: int = 32, scale_block: int = 0
                       ) -> float:
    """Storage of one weight: bits + scale_bits / block, plus second-level scales.

    With double quantisation `scale_block` scales share one float32: NF4 with blocks of 64 and
    8-bit scales in groups of 256 takes 4 + 8/64 + 32/(64 * 256) = 4.127 bits.
    """
    second = 32 / (block * scale_block) if scale_block else 0.0
    return bits + scale_bits / block + second


@dataclass(frozen=True)
class Quantized:
    """A weight as codes and two levels of scales."""

    format: Format
    codes: Tensor  # (n,) uint8
    scale_codes: Tensor  # (ceil(n / block),) uint8
    group_scales: Tensor  # (ceil(blocks / group),) in the format's dtype
    mean: Tensor  # () float32, of the scales

    @property
    def scales(self) -> Tensor:
        """(blocks,) float32: mean + level of the scale's code * scale of its group."""
        book = normal_float(self.format.scale_bits)
        return self.mean + dequantize_blocks(
            self.scale_codes, self.group_scales.float(), book, self.format.group)


def quantize(weight: Tensor, fmt: Format) -> Quantized:
    """Quantise twice: the weights by their blocks' scales, the scales by groups.

    The scales, less their mean, are coded with the b0-bit codebook; bitsandbytes uses a
    map of 8-bit floats there. The weights are coded last, by the scales as decoded.
    """
    blocks = _blocks(weight, fmt.block)
    absmax = blocks.abs().amax(1)
    require(absmax.isfinite().all(),
            "a weight is not a finite number: the model is damaged, fetch it again")
    mean = absmax.mean()
    groups = _blocks(absmax - mean, fmt.group)
    group_scales = groups.abs().amax(1).to(DTYPES[fmt.scale_dtype])
    require(group_scales.isfinite().all(), f"a scale is too large for {fmt.scale_dtype}")
    scale_codes = _codes(groups, group_scales.float(), normal_float(fmt.scale_bits))
    scale_codes = scale_codes[: absmax.numel()]
    scales = Quantized(fmt, scale_codes, scale_codes, group_scales, mean).scales
    codes = _codes(blocks, scales, normal_float(fmt.bits))[: weight.numel()]
    return Quantized(fmt, codes, scale_codes, group_scales, mean)


def dequantize(weight: Quantized) -> Tensor:
    """(n,) float32: level of the weight's code * scale of its block."""
    return dequantize_blocks(
        weight.codes, weight.scales, normal_float(weight.format.bits), weight.format.block)


def require_gguf_type(gguf_type: str) -> None:
    """UserError unless `encode` can make this type."""
    require(gguf_type in GGUF_TYPES,
            f"unknown GGUF type {gguf_type!r}: use one of {', '.join(GGUF_TYPES)}")


def encode(weight: Tensor, gguf_type: str, *, name: str = "the matrix") -> np.ndarray:
    """Rows of a matrix as GGUF stores them: (out, bytes) of blocks of 32 weights, or floats."""
    require_gguf_type(gguf_type)
    rows, stored = weight.detach().float().cpu().numpy(), gguf.GGMLQuantizationType[gguf_type]
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # checked below
            data = gguf.quants.quantize(rows, stored)
    except gguf.quants.QuantError as error:
        raise UserError(f"{name} cannot be {gguf_type} ({error}): use F16") from None
    largest = np.abs(rows).max()
    # Scales of blocks are float16, so only larger weights can overflow.
    finite = largest <= 65504 or np.isfinite(gguf.quants.dequantize(data, stored)).all()
    require(finite, f"{name} has a weight of {largest:g}, which {gguf_type} cannot hold: "
            "use F32, or fetch the weights again if they are damaged")
    return data


def decode(data: np.ndarray, gguf_type: str) -> Tensor:
    """(out, in) float32: the weights of what `encode` returned."""
    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[gguf_type]))


def round_trip(weight: Tensor, fmt: Format | str) -> Tensor:
    """The weight as it comes back from a format or a GGUF type: same shape, float32."""
    if isinstance(fmt, Format):
        return dequantize(quantize(weight, fmt)).view(weight.shape)
    return decode(encode(weight, fmt), fmt)
