"""What an adapter's first values can undo of a quantisation error.

An error is nearly of full rank, but a task's activations fill few directions:
weighed by them, a few components hold most of what the layer's output feels.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lib.base_model import load_tokenizer
from lib.coa import NAME, CoaLora, learned_a
from lib.configuration import Configuration
from lib.embedded import EMBEDDED
from lib.plans import best_levels
from lib.switchable import Switchable
from lib.tasks import Record, encode

# Share of the mean variance that every direction of the inputs gets at least.
DAMPING = 1e-3
SPARE, SWEEPS = 8, 3
# Examples that the inputs are taken from.
WEIGHED_BY = 32
# Layers that read what another one of their block reads.
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@torch.no_grad()
def input_roots(model: torch.nn.Module, names: Sequence[str], records: Sequence[Record], *,
                name: str = EMBEDDED) -> list[Tensor]:
    """L of each layer with L L^T = R, the mean of x x^T over its inputs; (in, in), float32.

    The inputs are those of the model as it is, on the records' tokens.

    Args:
        names: the linear layers of its blocks.
        name: the model's, for its tokenizer.
    """
    tokenizer, device = load_tokenizer(name), next(model.parameters()).device
    read_by = [_first(layer) for layer in names]
    moments: dict[str, Tensor | float] = dict.fromkeys(read_by, 0.0)

    def keep(layer: str, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).float()
        moments[layer] = moments[layer] + x.T @ x / len(x)

    hooks = [model.get_submodule(layer).register_forward_hook(
        lambda _, inputs, __, at=layer: keep(at, inputs[0])) for layer in moments]
    try:
        for record in records:
            model.model(input_ids=torch.tensor([encode(tokenizer, record)[0]], device=device))
    finally:
        for hook in hooks:
            hook.remove()
    roots = {layer: _root(moment.cpu()) for layer, moment in moments.items()}
    return [roots[layer] for layer in read_by]


def _first(name: str) -> str:
    """The layer of the block that stands for all that read the same input."""
    block, _, kind = name.rpartition(".")
    return f"{block}.{SHARED.get(kind, kind)}"


def _root(moment: Tensor) -> Tensor:
    """Lower triangular root (Cholesky), with a floor under the small directions."""
    floor = DAMPING * moment.diagonal().mean() + 1e-12
    return torch.linalg.cholesky(moment + floor * torch.eye(len(moment)))


def low_rank(error: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B, A) of the given rank that minimise |(E - B A) L|_F, with L of `input_roots`.

    That is the error of the layer's outputs. The best rank-r part of E L is taken
    back through L (QERA, Zhang et al. 2025, with the symmetric root). Row i of
    A and column i of B have the same norm, so that Adam moves both alike.
    """
    # Drawn from the global generator, which the training seeds.
    left, values, right = torch.svd_lowrank(
        error @ root, q=min(rank + SPARE, *error.shape), niter=SWEEPS)
    b = left[:, :rank] * values[:rank]
    # V^T L^(-1)
    a = torch.linalg.solve_triangular(root, right[:, :rank].T, upper=False, left=False)
    even = (b.norm(dim=0) / a.norm(dim=1).clamp(min=1e-12)).sqrt().clamp(min=1e-12)
    return b / even, a * even[:, None]


def _set(layer: torch.nn.Module, rows: Iterable[int], b: Tensor, a: Tensor) -> None:
    """Make some components (alpha / r) B A the given product."""
    rows, part = list(rows), layer.scaling[NAME] ** -0.5
    original = getattr(layer.lora_A[NAME], "parametrizations", None)
    weight = original.weight.original if original else layer.lora_A[NAME].weight
    weight.data[rows] = (part * a).to(weight)
    layer.lora_B[NAME].weight.data[:, rows] = (part * b).to(weight)


@torch.no_grad()
def start_from_error(model: torch.nn.Module, base: Switchable, plan: Configuration,
                     roots: Sequence[Tensor]) -> None:
    """All of an adapter starts from the low-rank part of one plan's error W - Q(W)."""
    for index, (name, level) in enumerate(zip(plan.layers.names, plan.levels, strict=True)):
        layer = model.get_submodule(f"base_model.model.{name}")
        error = base.weight(index) - base.weight(index, level)
        _set(layer, range(layer.r[NAME]), *low_rank(error, roots[index], layer.r[NAME]))


@torch.no_grad()
def start_owned(coa: CoaLora, roots: Sequence[Tensor]) -> None:
    """Each component that layers of b bits own starts from their mean error.

    The mean is over the levels of b bits that greedy plans use: their errors
    have much in common, those of other bits next to nothing.

    The rows of A that nobody owns grow by sqrt(r / their number): B starts at
    zero, so a step moves B A by the sum of |a|^2 over them, and they learn the
    task as fast as all r would.
    """
    base, levels = coa.base, best_levels(coa.base.grid)
    rank, owned = coa.network.rank, coa.network.owned
    shared = [i for i in range(rank) if not any(i in rows for rows in owned.values())]
    for layer in coa.places.values():
        learned_a(layer).data[shared] *= (rank / len(shared)) ** 0.5
    for bits, rows in owned.items():
        same = [level for level in levels if level.bits == bits]
        for index, layer in enumerate(coa.places.values()):
            mean = sum(base.weight(index, level) for level in same) / len(same)
            _set(layer, rows, *low_rank(base.weight(index) - mean, roots[index], len(rows)))
