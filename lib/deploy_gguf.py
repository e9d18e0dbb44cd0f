"""From a budget of bytes to a server's files: a type for each tensor of a GGUF file."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lib.artifacts import (
    MANIFEST,
    ROOT,
    read_json,
    saving,
    scratch,
    sha256,
    swap,
    write_json,
    writing,
)
from lib.base_model import quiet
from lib.bundle import Reader
from lib.client import ask_all, question
from lib.configuration import KINDS
from lib.correction import WEIGHED_BY, input_roots, low_rank
from lib.deploy import MB, TASKS, folder_size, require_new
from lib.embedded import EMBEDDED, embedded_gguf
from lib.errors import require
from lib.feedback import round_layers
from lib.gguf import export
from lib.lora import adapter_factors, load_adapter
from lib.merge import dequantized_base
from lib.plans import sensitivities, spend
from lib.quantize import rounded
from lib.serve import running
from lib.switchable import Switchable
from lib.tasks import Record, Score, keyword_hit

# What decodes fast for its size, bits a weight ascending: Q5_0 and Q5_1 are no
# faster than Q8_0 (`data/results/engine.json`).
CHOICES = {"Q4_0": 4.5, "Q4_1": 5.0, "Q8_0": 8.5}
HEAD = "model.embed_tokens"
SAMPLE = 1 << 14
# Examples whose gradients weigh the matrices' errors.
FELT = 4
# Our template and names beside the embedded file's own metadata.
MARGIN = 100_000


@dataclass(frozen=True)
class DeployedGguf:
    """What was written, and why.

    Attributes:
        way: "folded", the adapter added before quantising, or "beside", the
            adapter made anew for the base's rounded weights.
        types: how many matrices have each type.
        bits: bits a weight of all that is written, tokenizer included.
        scores: test answers of each way through the server.
    """

    way: str
    types: dict[str, int]
    predicted_mb: float
    actual_mb: float
    bits: float
    scores: dict[str, Score]

    def __str__(self) -> str:
        types = ", ".join(f"{n} in {kind}" for kind, n in self.types.items() if n)
        scores = "; ".join(f"{way} {score}" for way, score in self.scores.items())
        return (f"{self.bits:.2f} bits a weight: {types}\nchosen: the adapter {self.way}; "
                f"scores: {scores}")


def type_plan(weights: PreTrainedModel, felt: dict[str, float], budget: float
              ) -> tuple[dict[str, str], float]:
    """({module: type}, bytes): types under the budget by the error that the loss feels.

    Args:
        felt: sensitivity of each matrix, the tied embedding among them.
        budget: bytes for all matrices.

    Raises:
        UserError: a budget below the smallest type everywhere.
    """
    state, names = weights.state_dict(), list(felt)
    sizes = torch.tensor([state[f"{name}.weight"].numel() for name in names])
    costs = sizes[:, None] * torch.tensor([*CHOICES.values()]) / 8
    least = float(costs[:, 0].sum())
    require(budget >= least, "the budget is below the smallest file: "
            f"give {(least - budget) / MB + 0.1:.1f} MB more")
    errors = torch.tensor([[_error(state[f"{name}.weight"], kind) * felt[name]
                            for kind in CHOICES] for name in names])
    chosen = spend(errors, costs, budget)
    return ({name: [*CHOICES][i] for name, i in zip(names, chosen, strict=True)},
            float(costs[range(len(names)), chosen].sum()))


def _error(weight: torch.Tensor, kind: str) -> float:
    """Squared error of a type on whole rows of a sample, scaled to the matrix."""
    rows = weight[:: max(1, weight.numel() // SAMPLE)][:64].float()
    return float((rounded(rows, kind) - rows).square().sum()) * weight.numel() / rows.numel()


def deploy_gguf(task: str, budget_mb: float, out: Path, *, examples: int = 32,
                model: str = EMBEDDED, folder: Path = ROOT / "data") -> DeployedGguf:
    """Write what `python -m lib serve` serves, the better of two ways under the budget.

    The adapter must have one layer for each linear of the blocks.

    Raises:
        UserError: an unknown task, a place that is taken, a budget below the
            smallest file or above the model in 16 bits; nothing is written.
    """
    require_new(task, budget_mb, out)
    quiet()
    adapter = folder / "adapters" / f"{task}_qlora"
    base = Switchable.load(model)
    felt = sensitivities(base, TASKS[task]("train", FELT), more=(HEAD,))
    plain = 2 * base.model.num_parameters() / MB
    require(budget_mb < plain, f"{budget_mb:g} MB hold the model in 16 bits "
            f"({plain:.0f} MB): nothing need be quantised")
    names = (*base.layers.names, HEAD)
    shares = dict(zip(names, felt.tolist(), strict=True))
    quantised = dequantized_base(model)
    folded = load_adapter(copy.deepcopy(quantised), adapter).merge_and_unload().eval()
    roots = dict(zip(base.layers.names, input_roots(base, TASKS[task]("train", WEIGHED_BY)),
                     strict=True))
    ways = {"folded": folded, "beside": quantised}
    made, scores = {}, {}
    with saving(out), scratch(out) as work:
        for way, weights in ways.items():
            beside = {task: work / "adapter" / task} if way == "beside" else {}
            fixed = _metadata() + (_lora_bytes(adapter) if beside else 0) + _norms(weights)
            plan, size = type_plan(weights, shares, budget_mb * MB - fixed)
            stored = round_layers({name: weights.get_submodule(name).weight.data
                                   for name in roots}, roots, plan)
            for new in beside.values():
                correct(adapter, new, weights, stored, roots)
            for name, rows in stored.items():
                weights.get_submodule(name).weight.data = rows
            export(work / way, plan=plan, weights=weights, model=model,
                   merged=None if beside else adapter, adapters=beside)
            made[way] = (plan, (size + fixed) / MB)
            scores[way] = served_score(
                work / way, TASKS[task]("test", examples), task if beside else "")
        best = max(scores, key=lambda way: scores[way].share)
        swap(work / best, out)
    plan, predicted = made[best]
    types = {kind: [*plan.values()].count(kind) for kind in CHOICES}
    return DeployedGguf(best, types, predicted, folder_size(out) / MB,
                        8 * folder_size(out) / base.model.num_parameters(), scores)


@torch.no_grad()
def correct(adapter: Path, out: Path, weights: PreTrainedModel,
            stored: dict[str, torch.Tensor], roots: dict[str, torch.Tensor]) -> None:
    """Make an adapter anew for its base as the file will hold it, Q(W) instead of W.

    Its product becomes the low-rank part of W + dW - Q(W) that a layer's
    outputs feel: the rank stays, and takes up some of the rounding, too.
    """
    tensors = {}
    for module, (a, b, scale) in adapter_factors(adapter).items():
        weight = weights.get_submodule(module).weight.float()
        error = weight + scale * b @ a - stored[module]
        b, a = low_rank(error, roots[module], a.shape[0])
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.half().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.half().contiguous()
    config = read_json(adapter / "adapter_config.json")
    with writing(out, made_from=sha256(adapter / MANIFEST)) as part:
        save_file(tensors, part / "adapter_model.safetensors")
        write_json(part / "adapter_config.json",
                   config | {"lora_alpha": config["r"], "use_rslora": False})


def _metadata() -> int:
    with embedded_gguf() as path:
        return int(Reader(path).data_offset) + MARGIN


def _lora_bytes(adapter: Path) -> int:
    return (adapter / "adapter_model.safetensors").stat().st_size + MARGIN


def _norms(weights: PreTrainedModel) -> int:
    return sum(4 * t.numel() for name, t in weights.state_dict().items()
               if name.split(".")[-2] not in (*KINDS, "embed_tokens", "lm_head"))


def served_score(path: Path, records: Sequence[Record], name: str = "") -> Score:
    """Keyword score of a server's answers, by the adapter of this name if any."""
    with running(path) as served:
        answers = ask_all(served.url, [question(r["instruction"], model=name)
                                       for r in records])
    return Score(tuple(keyword_hit(a.text, r["expected_keyword"])
                       for a, r in zip(answers, records, strict=True)),
                 tuple(a.text for a in answers))
