"""NormalFloat, block by block (Dettmers et al. 2023, QLoRA, section 3)."""

from statistics import NormalDist

import torch
from torch import Tensor

from lib.errors import require

# Probability mass left outside the outermost quantiles, as in QLoRA's table.
TAIL = 0.9677083


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


def quantize_blocks(weight: Tensor, codebook: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Nearest codebook entry of each weight, scaled by its block's absmax.

    Args:
        weight: any shape; flattened row by row. The last block may be short.
        codebook: (levels,), ascending, within [-1, 1].
        block: weights that share one scale.

    Returns:
        codes (n,) uint8 and absmax (ceil(n / block),) float32.
    """
    require(block > 0, f"block size {block}: use a positive whole number")
    flat = weight.detach().float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    # An all-zero block has scale 0; any code times 0 is 0 again.
    scaled = blocks / torch.where(absmax > 0, absmax, 1.0)[:, None]
    middles = (codebook[1:] + codebook[:-1]) / 2
    codes = torch.bucketize(scaled, middles.to(scaled.device))
    return codes.reshape(-1)[: flat.numel()].to(torch.uint8), absmax


def dequantize_blocks(codes: Tensor, absmax: Tensor, codebook: Tensor, block: int) -> Tensor:
    """(n,) float32 weights: codebook[code] * absmax of the block."""
    scales = absmax.repeat_interleave(block)[: codes.numel()]
    return codebook[codes.long()] * scales


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
