"""Rounding to GGUF's Q4_0 blocks so that later columns make good the error of earlier ones.

GPTQ (Frantar et al. 2023, section 3): with R the mean of x x^T over a layer's inputs and
U the upper Cholesky factor of R^-1, column j is rounded and its error (w_j - q_j) / U_jj
times U_jk is taken off each column k > j. That keeps |(W - Q) L|_F small, with L L^T = R.
The scale of a block is found when its first column is reached.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

KIND, BLOCK = "Q4_0", 32


@torch.no_grad()
def round_layers(weights: Mapping[str, Tensor], roots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each weight (out, in) as Q4_0 stores it, float32; roots are `input_roots`' L, (in, in)."""
    found: dict[str, Tensor] = {}
    groups: dict[torch.Size, list[str]] = {}
    for name, weight in weights.items():
        groups.setdefault(weight.shape, []).append(name)
    for names in groups.values():
        # Layers of one shape together: a step over columns costs little more than for one.
        many = with_feedback(torch.stack([weights[n].float() for n in names]),
                             torch.stack([roots[n] for n in names]))
        found |= dict(zip(names, many, strict=True))
    return found


def with_feedback(weight: Tensor, root: Tensor) -> Tensor:
    """Q of weights (..., out, in), in a multiple of 32, with roots (..., in, in).

    What comes out lies on the type's levels, and is found again bit for bit when it is
    written: the number that sets a block's scale keeps its code, whatever it is by then.
    """
    weight = weight.clone()
    # From R = L L^T; its inverse's factor says what later columns can take over.
    ahead = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)
    for start in range(0, weight.shape[-1], BLOCK):
        block = weight[..., start:start + BLOCK]
        turn, errors = _scaled(block), torch.empty_like(block)
        factor = ahead[..., start:start + BLOCK, start:]
        for j in range(BLOCK):
            column = turn(j, block[..., j])
            errors[..., j] = (block[..., j] - column) / factor[..., j, j, None]
            block[..., j] = column
            block[..., j + 1:] -= errors[..., j, None] * factor[..., j, None, j + 1:BLOCK]
        weight[..., start + BLOCK:] -= errors @ factor[..., BLOCK:]
    return weight


def _scaled(block: Tensor) -> Callable[[int, Tensor], Tensor]:
    """The function that rounds column j of a block by the scale the block has now."""
    # The number of largest size is coded 0 and stands for -8 d.
    low = block.gather(-1, at := block.abs().argmax(-1, keepdim=True))[..., 0]
    step = (low / -8).half().float()
    inverse = torch.where(step == 0, 0, 1 / step)

    def turn(j: int, column: Tensor) -> Tensor:
        codes = (column * inverse + 8.5).floor().clamp(0, 15)
        codes[at[..., 0] == j] = 0
        return (codes - 8) * step

    return turn
