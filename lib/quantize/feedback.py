"""Rounding to GGUF's Q4_0 so that later columns compensate for the error of earlier ones.

GPTQ (Frantar et al. 2023, section 3): with R the mean of x x^T over a layer's inputs and
U the upper Cholesky factor of R^-1, column j is rounded and its error (w_j - q_j) / U_jj
times U_jk is subtracted from each column k > j. That keeps |(W - Q) L|_F small, with
L L^T = R. The scale of a block is fixed when its first column is reached.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

BLOCK = 32


def encode_with_feedback(weights: Mapping[str, Tensor], roots: Mapping[str, Tensor]
                         ) -> dict[str, np.ndarray]:
    """Each weight (out, in) as `encode` gives Q4_0; roots are `input_roots`' L, (in, in)."""
    encoded: dict[str, np.ndarray] = {}
    names_by_shape: dict[torch.Size, list[str]] = {}
    for name, weight in weights.items():
        names_by_shape.setdefault(weight.shape, []).append(name)
    for names in names_by_shape.values():
        # Layers of one shape together: a step over columns costs little more than for one.
        codes, scales = codes_with_feedback(torch.stack([weights[n].float() for n in names]),
                                            torch.stack([roots[n] for n in names]))
        for name, layer_codes, layer_scales in zip(names, codes, scales, strict=True):
            encoded[name] = pack_q4_0(layer_codes, layer_scales)
    return encoded


@torch.no_grad()
def codes_with_feedback(weight: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_0 of weights (..., out, in), in a multiple of 32, with roots (..., in, in).

    Returns:
        codes (..., out, in) uint8 and scales (..., out, in / 32) float16:
        a weight is (code - 8) * scale.
    """
    weight, codes, scales = weight.clone(), torch.empty_like(weight, dtype=torch.uint8), []
    # The factor of R^-1, with R = L L^T, says what later columns can take over.
    ahead = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)
    for start in range(0, weight.shape[-1], BLOCK):
        block, errors = weight[..., start:start + BLOCK].clone(), []
        factor = ahead[..., start:start + BLOCK, start:]
        # The number of largest size has code 0 and stands for -8 times the scale.
        top = block.abs().argmax(-1)
        scales.append((block.gather(-1, top[..., None])[..., 0] / -8).half())
        scale = scales[-1].float()
        inverse = torch.where(scale == 0, 0, 1 / scale)
        for j in range(BLOCK):
            column = (block[..., j] * inverse + 8.5).floor().clamp(0, 15)
            column[(top == j) & (scale != 0)] = 0
            codes[..., start + j] = column.byte()
            errors.append((block[..., j] - (column - 8) * scale) / factor[..., j, j, None])
            block[..., j + 1:] -= errors[j][..., None] * factor[..., j, None, j + 1:BLOCK]
        weight[..., start + BLOCK:] -= torch.stack(errors, -1) @ factor[..., BLOCK:]
    return codes, torch.stack(scales, -1)


def pack_q4_0(codes: Tensor, scales: Tensor) -> np.ndarray:
    """(out, bytes) of Q4_0: a block is its float16 scale, then codes i and i + 16 in byte i."""
    halves = codes.reshape(-1, 2, BLOCK // 2)
    pairs = halves[:, 0] | halves[:, 1] << 4
    blocks = torch.cat([scales.reshape(-1, 1).view(torch.uint8), pairs], 1)
    return blocks.view(len(codes), -1).numpy()
