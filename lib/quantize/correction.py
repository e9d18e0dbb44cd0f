"""What the low-rank factors of an adapter can undo of a quantisation error.

An error has nearly full rank, but a task's activations fill few directions: weighted by
them, a few components hold most of the error that the layer's output shows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lib.base.embedded import EMBEDDED
from lib.base.model import load_tokenizer
from lib.base.prompts import encode
from lib.base.records import Record

# Share of the mean variance that every direction of the inputs gets at least.
DAMPING = 1e-3
SPARE, SWEEPS = 8, 3
# Examples that the inputs are taken from.
WEIGHED_BY = 32
# Module kinds that read the same input as another one of their block.
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@torch.no_grad()
def input_roots(model: torch.nn.Module, names: Sequence[str], records: Sequence[Record], *,
                name: str = EMBEDDED) -> list[Tensor]:
    """L of each layer with L L^T = R, the mean of x x^T over its inputs; (in, in), float32.

    The inputs are those of `model` as it is, on the records; `name` says its tokenizer.
    """
    tokenizer, device = load_tokenizer(name), next(model.parameters()).device
    read_by = []
    for layer in names:
        block, _, kind = layer.rpartition(".")
        read_by.append(f"{block}.{SHARED.get(kind, kind)}")
    moments: dict[str, Tensor | float] = dict.fromkeys(read_by, 0.0)

    def add(layer: str, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).float()
        moments[layer] = moments[layer] + x.T @ x / len(x)

    hooks = [model.get_submodule(layer).register_forward_hook(
        lambda _, inputs, __, layer=layer: add(layer, inputs[0])) for layer in moments]
    try:
        for record in records:
            model.model(input_ids=torch.tensor([encode(tokenizer, record)[0]], device=device))
    finally:
        for hook in hooks:
            hook.remove()
    roots = {}
    for layer, moment in moments.items():
        floor = DAMPING * moment.diagonal().mean().cpu() + 1e-12
        roots[layer] = torch.linalg.cholesky(moment.cpu() + floor * torch.eye(len(moment)))
    return [roots[layer] for layer in read_by]


def low_rank(error: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B, A) of the given rank that minimise |(E - B A) L|_F, with L of `input_roots`.

    That is the error of the layer's outputs. The best rank-r part of E L is taken back
    through L (QERA, Zhang et al. 2025, with the symmetric root). Row i of A and column i
    of B have the same norm, so that Adam moves both alike. Draws from torch's generator.
    """
    left, values, right = torch.svd_lowrank(
        error @ root, q=min(rank + SPARE, *error.shape), niter=SWEEPS)
    b = left[:, :rank] * values[:rank]
    # V^T L^(-1)
    a = torch.linalg.solve_triangular(root, right[:, :rank].T, upper=False, left=False)
    balance = (b.norm(dim=0) / a.norm(dim=1).clamp(min=1e-12)).sqrt().clamp(min=1e-12)
    return b / balance, a * balance[:, None]
