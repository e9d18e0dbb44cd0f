"""Rounding whose error a layer's outputs feel little, and what an adapter can undo of it.
A task's inputs x fill few directions. R is the mean of their x x^T, and L its root: L L^T = R."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.base.model import context
from lib.base.records import Record, encode
from lib.errors import require
from lib.quantize import formats

DAMPING = 1e-3  # share of the mean variance that every direction of the inputs gets at least
SPARE, SWEEPS = 8, 3
WEIGHED_BY = 32  # examples that the inputs are taken from
# Module kinds that read the same input as another one of their block.
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
BLOCK = 32  # weights that share a scale of Q4_0


@torch.no_grad()
def input_sums(model: torch.nn.Module, names: Sequence[str], records: Sequence[Record], *,
               add: Callable[[Tensor, Tensor], Tensor], tokenizer: Any) -> dict[str, Tensor]:
    """{layer: a sum, to which `add` adds each record's inputs (tokens, in) over sqrt(tokens)}."""
    device, sums = next(model.parameters()).device, dict[str, Tensor]()

    def see(layer: str, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).float()
        if len(x):  # an expert may get no token
            sums[layer] = add(sums.get(layer, x.new_zeros(1)), x / len(x) ** 0.5)

    hooks = [model.get_submodule(layer).register_forward_hook(
        lambda _, inputs, __, layer=layer: see(layer, inputs[0])) for layer in names]
    try:
        for number, record in enumerate(records, 1):
            ids = torch.tensor([encode(tokenizer, record, learn="last")[0]], device=device)
            require(ids.shape[1] <= context(model), f"record {number} is longer than the model's "
                    f"context, {context(model)} tokens: split it")
            model(input_ids=ids, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def input_roots(model: torch.nn.Module, names: Sequence[str], records: Sequence[Record], *,
                tokenizer: Any) -> list[Tensor]:
    """L of each layer over its inputs on the records, (in, in) float32."""
    places = (layer.rpartition(".") for layer in names)
    read_by = [f"{block}.{SHARED.get(kind, kind)}" for block, _, kind in places]
    roots, moments = {}, input_sums(model, [*dict.fromkeys(read_by)], records, tokenizer=tokenizer,
                                    add=lambda total, x: torch.addmm(total, x.T, x))
    for layer, moment in moments.items():
        floor = DAMPING * moment.diagonal().mean().cpu() + 1e-12
        roots[layer] = torch.linalg.cholesky(moment.cpu() + floor * torch.eye(len(moment)))
    return [roots[layer] for layer in read_by]


def low_rank(error: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B, A) of the given rank that minimise |(E - B A) L|_F, the error of the outputs.
    The best rank-r part of E L, taken back through L (QERA, Zhang et al. 2025). Row i of A and
    column i of B have one norm, so that Adam moves both alike. Draws from torch's generator."""
    left, values, right = torch.svd_lowrank(
        error @ root, q=min(rank + SPARE, *error.shape), niter=SWEEPS)
    b = left[:, :rank] * values[:rank]
    a = torch.linalg.solve_triangular(root, right[:, :rank].T, upper=False, left=False)  # V^T/L
    balance = (b.norm(dim=0) / a.norm(dim=1).clamp(min=1e-12)).sqrt().clamp(min=1e-12)
    return b / balance, a * balance[:, None]


def encode_with_feedback(weights: Mapping[str, Tensor], roots: Mapping[str, Tensor]
                         ) -> dict[str, np.ndarray]:
    """Each weight (out, in) as `encode` gives Q4_0; roots are `input_roots`' L, (in, in)."""
    encoded: dict[str, np.ndarray] = {}
    for shape in {weight.shape: None for weight in weights.values()}:
        # Layers of one shape together: a step over columns costs little more than for one.
        names = [name for name, weight in weights.items() if weight.shape == shape]
        for few in (names[i:i + 10] for i in range(0, len(names), 10)):  # all take a gigabyte
            codes, scales = codes_with_feedback(torch.stack([weights[n].float() for n in few]),
                                                torch.stack([roots[n] for n in few]))
            encoded |= zip(few, map(pack_q4_0, codes, scales), strict=True)
    return encoded


@torch.no_grad()
def codes_with_feedback(weight: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_0, rounded so that later columns compensate for the error of earlier ones.
    GPTQ (Frantar et al. 2023, section 3): with U the upper Cholesky factor of R^-1, column j
    is rounded and its error (w_j - q_j) / U_jj times U_jk is subtracted from each column k > j.
    That keeps |(W - Q) L|_F small. When a block's first column is reached it gets the scale that
    llama.cpp chooses, with the mean square of each input as importance.
    From (layers, out, in), in a multiple of 32, and (layers, in, in): codes (layers, out, in) uint8
    and scales (layers, out, in / 32) float16. A weight is (code - 8) * scale."""
    weight, codes, scales = weight.clone(), torch.empty_like(weight, dtype=torch.uint8), []
    ahead = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)
    for start in range(0, weight.shape[-1], BLOCK):
        block, errors = weight[..., start:start + BLOCK].clone(), []
        factor = ahead[..., start:start + BLOCK, start:]
        chosen = (formats.encode(layer, "Q4_0", importance=felt)[:, :2] for layer, felt
                  in zip(block, root[:, start:start + BLOCK].square().sum(-1), strict=True))
        scales.append(torch.from_numpy(np.stack([*chosen])).view(torch.float16)[..., 0])
        scale = scales[-1].float()
        inverse = torch.where(scale == 0, 0, 1 / scale)
        for j in range(BLOCK):
            column = (block[..., j] * inverse + 8.5).floor().clamp(0, 15)
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
