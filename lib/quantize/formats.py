"""Formats of one matrix, rounding to them, and packing codes in exactly their bits.
A format is CoA-LoRA's (b, b0, b1, B0, B1), NormalFloat with two-level scales, or a GGUF type."""

import ctypes
import functools
import itertools
from dataclasses import astuple, dataclass
from statistics import NormalDist
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp.xllamacpp
from torch import Tensor, nn

from lib.errors import require

CELLS = 1024  # of the table that finds codes: midpoints of 8 bits are 0.005 apart
GRID: dict[str, tuple[Any, ...]] = {
    "bits": (2, 3, 4, 8), "scale_bits": (2, 3, 4, 8), "scale_dtype": ("bf16", "fp16", "fp32"),
    "block": (16, 32, 64), "group": (16, 64, 256)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# llama.cpp's types: in blocks of 32, 8.5 to 4.25 bits a weight, and of 256, 6.56 to 2.63.
GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "MXFP4",
              "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "Q2_K")
# What llama.cpp takes for rows that blocks of 256 do not divide; IQ4_NL in place of the others.
FALL_BACK = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0"}
# llama.cpp in the wheel of its server: its own code writes and reads every type.
ENGINE = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
TAIL = 0.9677083  # probability below the outermost quantile, as in QLoRA's table
PARTS = ("codes", "scale_codes", "group_scales", "mean")  # of a packed layer


@dataclass(frozen=True)
class Format:
    """How one layer is stored: (b, b0, b1, B0, B1) in the paper's order."""

    bits: int = 4  # b, of a weight's code
    scale_bits: int = 8  # b0, of a scale's code
    scale_dtype: str = "fp32"  # b1, of the second-level scales
    block: int = 64  # B0, weights that share one scale
    group: int = 256  # B1, scales that share one second-level scale

    def __post_init__(self) -> None:
        for (name, values), value in zip(GRID.items(), astuple(self), strict=True):
            require(any(value == v and type(value) is type(v) for v in values),
                    f"{name} is {value!r}: use one of {', '.join(map(str, values))}")

    @property
    def bits_per_parameter(self) -> float:
        """b + b0 / B0 + bits(b1) / (B0 B1): the storage of a weight in a large layer."""
        return (self.bits + self.scale_bits / self.block
                + 8 * DTYPES[self.scale_dtype].itemsize / (self.block * self.group))

    def scales(self, count: int) -> tuple[int, int]:
        """First- and second-level scales of `count` weights."""
        blocks = -(-count // self.block)
        return blocks, -(-blocks // self.group)

    def storage_bits(self, count: int) -> int:
        """Bits of `count` weights: the formula on whole blocks and groups, and 32 for the mean."""
        blocks, groups = self.scales(count)
        return (count * self.bits + blocks * self.scale_bits
                + 8 * groups * DTYPES[self.scale_dtype].itemsize + 32)

    def __str__(self) -> str:
        return f"{self.bits} bits"


class GgufFormat(str):
    """How one layer is stored: the name of one of llama.cpp's types, rounded by its own code."""

    @property
    def bits_per_parameter(self) -> float:
        """Bits of a block over its weights."""
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self]]
        return 8 * size / block

    def storage_bits(self, count: int) -> int:
        """Bits of `count` weights, whole blocks."""
        return int(count * self.bits_per_parameter)


# The two families, GGUF's types in the order of their cost, and the fields of each.
FORMATS = tuple(Format(*values) for values in itertools.product(*GRID.values()))
FAMILIES = {"nf": FORMATS, "gguf": tuple(map(GgufFormat, (
    "MXFP4", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")))}  # of blocks of 32, for all rows
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {"nf": GRID, "gguf": {"type": FAMILIES["gguf"]}}


@functools.cache
def normal_float(bits: int) -> Tensor:
    """Codebook of 2^bits quantisation levels in [-1, 1], float32, ascending.
    Quantiles of N(0, 1) at evenly spaced probabilities: 2^(bits-1) above zero, one less below,
    and zero itself; all divided by the largest."""
    require(2 <= bits <= 8, f"{bits} bits: NormalFloat is defined here for 2 to 8")
    half, levels = 2 ** (bits - 1), [0.0]
    for count, sign in ((half, 1), (half - 1, -1)):
        step = (TAIL - 0.5) / count
        levels += [sign * NormalDist().inv_cdf(TAIL - i * step) for i in range(count)]
    return (torch.tensor(sorted(levels), dtype=torch.float64) / max(levels)).float()


def quantize_blocks(weight: Tensor, codebook: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes (n,) uint8 and absmax (ceil(n / block),) float32 of a weight, row by row.
    A code is the nearest entry, of two the lower one, of a codebook (levels,), ascending in
    [-1, 1], scaled by the block's absmax. The last block may be short."""
    absmax = (blocks := _blocks(weight, block)).abs().amax(1)
    return _codes(blocks, absmax, codebook)[: weight.numel()], absmax


def _blocks(values: Tensor, block: int) -> Tensor:
    """(ceil(n / block), block) float32, the last one padded with zeros."""
    require(block > 0, f"block size {block}: use a positive whole number")
    flat = values.detach().float().reshape(-1)
    return nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def _codes(blocks: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """Nearest level of each number divided by its block's scale, flat, uint8."""
    if len(blocks) > 1 << 14:  # in parts that fit in a cache
        parts = zip(blocks.split(1 << 14), scales.split(1 << 14), strict=True)
        return torch.cat([_codes(*part, levels) for part in parts])
    scales = torch.where(scales != 0, scales, 1.0)[:, None]  # all codes of a scale 0 give zeros
    values, midpoints = (blocks / scales).view(-1), (levels[1:] + levels[:-1]) / 2
    cells, own = (x.mul(CELLS / 2).add_(CELLS / 2).clamp_(0, CELLS - 1).int()
                  for x in (values, midpoints))
    if values.dtype != levels.dtype or len(own.unique()) < len(own) or not scales.isfinite().all():
        return torch.bucketize(values, midpoints, out_int32=True).byte()
    # Half of that bisection's time from 4 bits on: a cell over [-1, 1] has one midpoint at most.
    border = midpoints.new_full((CELLS,), torch.inf).index_put_((own.long(),), midpoints)
    below = torch.bucketize(torch.arange(CELLS, device=own.device), own, out_int32=True).byte()
    return below.index_select(0, cells) + (values > border.index_select(0, cells))


def dequantize_blocks(codes: Tensor, absmax: Tensor, codebook: Tensor, block: int) -> Tensor:
    """(n,) float32 weights: codebook[code] * absmax of the block."""
    values = codebook.to(codes.device).index_select(0, codes.int())
    whole = values.numel() // block * block
    values[:whole].view(-1, block).mul_(absmax[: whole // block, None])
    values[whole:] *= absmax[-1]  # a short last block
    return values


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
        levels = normal_float(self.format.scale_bits)
        return self.mean + dequantize_blocks(self.scale_codes, self.group_scales.float(), levels,
                                             self.format.group)


def quantize(weight: Tensor, fmt: Format) -> Quantized:
    """Quantise the scales, less their mean, by groups, then the weights by the decoded scales.
    Scales are coded with the b0-bit codebook; bitsandbytes uses a map of 8-bit floats there."""
    absmax = (blocks := _blocks(weight, fmt.block)).abs().amax(1)
    require(absmax.isfinite().all(), "a weight is not finite: the model is damaged, fetch it again")
    mean = absmax.mean()
    groups = _blocks(absmax - mean, fmt.group)
    group_scales = groups.abs().amax(1).to(DTYPES[fmt.scale_dtype])
    require(group_scales.isfinite().all(), f"a scale is too large for {fmt.scale_dtype}")
    scale_codes = _codes(groups, group_scales.float(), normal_float(fmt.scale_bits))[:len(absmax)]
    scales = Quantized(fmt, scale_codes, scale_codes, group_scales, mean).scales
    codes = _codes(blocks, scales, normal_float(fmt.bits))[: weight.numel()]
    return Quantized(fmt, codes, scale_codes, group_scales, mean)


def dequantize(weight: Quantized) -> Tensor:
    """(n,) float32: level of the weight's code * scale of its block."""
    return dequantize_blocks(
        weight.codes, weight.scales, normal_float(weight.format.bits), weight.format.block)


def fitting(gguf_type: str, columns: int) -> str:
    """The type, or llama.cpp's replacement where its blocks do not divide rows of `columns`."""
    require(gguf_type in GGUF_TYPES, f"GGUF type {gguf_type!r}: use {', '.join(GGUF_TYPES)}")
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[gguf_type]][0]
    if block > 32 and columns % block:
        return fitting(FALL_BACK.get(gguf_type, "IQ4_NL"), columns)
    return "F16" if columns % block else gguf_type


def encode(weight: Tensor, gguf_type: str, *, name: str = "the matrix",
           importance: Tensor | None = None) -> np.ndarray:
    """Rows of a matrix as GGUF stores them: (..., out, bytes) of blocks, or floats.
    `importance` (in,) weighs each column's squared error, in the types that take it."""
    fits = fitting(gguf_type, columns := weight.shape[-1])
    require(fits == gguf_type, f"{name} has rows of {columns}, not for {gguf_type}: use {fits}")
    rows = np.ascontiguousarray(weight.detach().float().cpu().numpy())
    stored, largest = gguf.GGMLQuantizationType[gguf_type], np.abs(rows).max(initial=0)
    # Floats and the scales of blocks are float16.
    require(largest < (np.inf if gguf_type in ("F32", "BF16") else 65505), f"{name} has a weight "
            f"of {largest:g}, which {gguf_type} cannot hold: use F32, or mend the model")
    block, size = gguf.GGML_QUANT_SIZES[stored]
    if block == 1:
        return gguf.quants.quantize(rows, stored)
    data = np.empty((*rows.shape[:-1], rows.shape[-1] // block * size), np.uint8)
    weigh = None if importance is None else np.ascontiguousarray(importance.float().numpy())
    ENGINE.ggml_quantize_chunk(stored, *map(ctypes.c_void_p, (rows.ctypes.data, data.ctypes.data)),
        *map(ctypes.c_int64, (0, rows.size // rows.shape[-1], rows.shape[-1])),
        ctypes.c_void_p(None if weigh is None else weigh.ctypes.data))
    return data


def decode(data: np.ndarray, gguf_type: str) -> Tensor:
    """(out, in) float32: the weights of what `encode` returned."""
    block, size = gguf.GGML_QUANT_SIZES[stored := gguf.GGMLQuantizationType[gguf_type]]
    if block == 1:  # of a mapped file, a copy
        return torch.from_numpy(np.require(gguf.quants.dequantize(data, stored), requirements="W"))
    data = np.ascontiguousarray(data)
    rows = torch.empty(*data.shape[:-1], data.shape[-1] // size * block)
    read = getattr(ENGINE, f"dequantize_row_{gguf_type.lower().replace('_k', '_K')}")
    read(*map(ctypes.c_void_p, (data.ctypes.data, rows.data_ptr())), ctypes.c_int64(rows.numel()))
    return rows


def round_trip(weight: Tensor, fmt: Format | str) -> Tensor:
    """The weight as it comes back from a format or a GGUF type: same shape, float32."""
    if isinstance(fmt, Format):
        return dequantize(quantize(weight, fmt)).view(weight.shape)
    return decode(encode(weight, fmt), fmt)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes (n,) uint8 as ceil(n * bits / 8) bytes: code i from bit i * bits on, lowest first."""
    require(1 <= bits <= 8, f"{bits} bits: use 1 to 8")
    each = codes.numpy()[:, None] >> np.arange(bits, dtype=np.uint8) & 1
    return torch.from_numpy(np.packbits(each, bitorder="little"))


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes, uint8, of a stream from `pack_bits`; UserError if its length differs."""
    require(stream.numel() == -(-count * bits // 8),
            f"{stream.numel()} bytes do not hold {count} codes of {bits} bits: make them again")
    each = np.unpackbits(stream.numpy(), count=count * bits, bitorder="little").reshape(-1, bits)
    return torch.from_numpy(each @ (1 << np.arange(bits, dtype=np.uint8)))


def pack_weight(weight: Quantized) -> dict[str, Tensor]:
    """A layer as four rows of bytes, so that no change of a model's dtype rounds its scales."""
    return {"codes": pack_bits(weight.codes, weight.format.bits),
            "scale_codes": pack_bits(weight.scale_codes, weight.format.scale_bits),
            "group_scales": weight.group_scales.view(torch.uint8),
            "mean": weight.mean.view(1).view(torch.uint8)}


def unpack_weight(parts: dict[str, Tensor], fmt: Format, count: int) -> Quantized:
    """The `count` weights that `pack_weight` packed; UserError for a part of another length."""
    blocks, groups = fmt.scales(count)
    scales, mean = parts["group_scales"].view(DTYPES[fmt.scale_dtype]), parts["mean"]
    require((len(scales), mean.nbytes) == (groups, 4), "its scales have another number")
    return Quantized(fmt, unpack_bits(parts["codes"], fmt.bits, count), unpack_bits(
        parts["scale_codes"], fmt.scale_bits, blocks), scales, mean.view(torch.float32)[0])
