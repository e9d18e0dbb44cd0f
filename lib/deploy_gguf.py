"""From a budget of bytes to a server's files: a type for each tensor of a GGUF file."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lib.artifacts import MANIFEST, ROOT, read_json, sha256, swap, write_json, writing
from lib.base_model import quiet
from lib.bundle import Reader
from lib.client import ask_all, question
from lib.configuration import KINDS
from lib.correction import WEIGHED_BY, input_roots, low_rank
from lib.deploy import MB, TASKS, folder_size, require_new, require_tied
from lib.embedded import EMBEDDED, embedded_gguf
from lib.errors import require
from lib.feedback import KIND, round_layers
from lib.gguf import export
from lib.lora import adapter_factors, load_adapter
from lib.merge import dequantized_base
from lib.plans import sensitivities, spend
from lib.quantize import rounded
from lib.scratch import scratch
from lib.serve import running
from lib.switchable import Switchable
from lib.tasks import Record, Score, keyword_hit

# What decodes fast for its size, bits a weight ascending: the fifth bit of Q5_0
# takes all of the speed that its bytes give, Q4_1's offset half of it
# (`data/results/engine.json`).
CHOICES = {"Q4_0": 4.5, "Q8_0": 8.5}
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
        scores: validation answers of each way through the server, since they choose the way.
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
                f"validation: {scores}")


def type_plan(sizes: Mapping[str, int], errors: Mapping[str, Sequence[float]], budget: float
              ) -> tuple[dict[str, str], float]:
    """({module: type}, bytes): the types of least error under the budget.

    Args:
        sizes: numbers in each matrix.
        errors: of each matrix in each type, as the loss feels it.
        budget: bytes for all matrices, at least those of the smallest type.
    """
    costs = torch.tensor([*sizes.values()])[:, None] * torch.tensor([*CHOICES.values()]) / 8
    chosen = spend(torch.tensor([errors[name] for name in sizes]), costs, budget)
    return ({name: [*CHOICES][i] for name, i in zip(sizes, chosen, strict=True)},
            float(costs[range(len(sizes)), chosen].sum()))


def type_errors(weight: torch.Tensor, felt: float, fed: torch.Tensor | None = None,
                root: torch.Tensor | None = None) -> list[float]:
    """What the loss feels of a matrix in each type: squared error times sensitivity.

    Rounding with feedback, `fed`, has a larger error than plain rounding, in
    directions that its inputs lack: Q4_0's error is made as much smaller as that
    of the layer's outputs. Taken from whole rows of a sample.
    """
    rows = slice(None, None, max(1, weight.numel() // SAMPLE))
    part = weight[rows][:64].float()
    missed = {kind: rounded(part, kind) - part for kind in CHOICES}
    errors = {kind: float(miss.square().sum()) for kind, miss in missed.items()}
    if fed is not None and errors[KIND]:
        ours, plain = (miss @ root for miss in (fed[rows][:64] - part, missed[KIND]))
        errors[KIND] *= float(ours.square().sum() / plain.square().sum())
    return [error * felt * weight.numel() / part.numel() for error in errors.values()]


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
    require_tied(base)
    plain = 2 * base.model.num_parameters() / MB
    require(budget_mb < plain, f"{budget_mb:g} MB hold the model in 16 bits "
            f"({plain:.0f} MB): nothing need be quantised")
    names = (*base.layers.names, HEAD)
    sizes = {name: base.model.get_submodule(name).weight.numel() for name in names}
    room, least = budget_mb * MB - _metadata() - _norms(base.model), _least(sizes)
    require(room >= least, "the budget is below the smallest file, "
            f"{budget_mb + (least - room) / MB:.1f} MB: give {(least - room) / MB:.1f} MB more")
    felt = dict(zip(names, sensitivities(
        base, TASKS[task]("train", FELT), more=(HEAD,)).tolist(), strict=True))
    quantised = dequantized_base(model)
    folded = load_adapter(copy.deepcopy(quantised), adapter).merge_and_unload().eval()
    # The inputs with the adapter at work: the base alone has others.
    roots = dict(zip(base.layers.names, input_roots(
        folded, base.layers.names, TASKS[task]("train", WEIGHED_BY), name=model), strict=True))
    ways = {"folded": (folded, room), "beside": (quantised, room - _lora_bytes(adapter))}
    made, scores = {}, {}
    with scratch(out) as work:
        for way, (weights, left) in ways.items():
            if left < least:
                continue  # there is room for the adapter only inside the weights
            plan, size, stored = _chosen(weights, sizes, felt, roots, left)
            beside = {task: work / "adapter" / task} if way == "beside" else {}
            for new in beside.values():
                correct(adapter, new, weights, stored, roots)
            for name, rows in stored.items():
                weights.get_submodule(name).weight.data = rows
            export(work / way, plan=plan, weights=weights, model=model,
                   merged=None if beside else adapter, adapters=beside)
            made[way] = (plan, budget_mb - (left - size) / MB)
            scores[way] = served_score(
                work / way, TASKS[task]("validation", examples), task if beside else "")
        best = max(scores, key=lambda way: scores[way].share)
        swap(work / best, out)
    plan, predicted = made[best]
    types = {kind: [*plan.values()].count(kind) for kind in CHOICES}
    return DeployedGguf(best, types, predicted, folder_size(out) / MB,
                        8 * folder_size(out) / base.model.num_parameters(), scores)


def _chosen(weights: PreTrainedModel, sizes: Mapping[str, int], felt: Mapping[str, float],
            roots: Mapping[str, torch.Tensor], room: float
            ) -> tuple[dict[str, str], float, dict[str, torch.Tensor]]:
    """(plan, bytes, the blocks' linears as the plan stores them)."""
    whole = {name: weights.get_submodule(name).weight.data for name in felt}
    fed = round_layers({name: whole[name] for name in roots}, roots)
    plan, size = type_plan(
        sizes, {name: type_errors(weight, felt[name], fed.get(name), roots.get(name))
                for name, weight in whole.items()}, room)
    return plan, size, {name: rows if plan[name] == KIND else rounded(whole[name], plan[name])
                        for name, rows in fed.items()}


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


def _least(sizes: Mapping[str, int]) -> float:
    """Bytes of all matrices in the smallest type, and a tenth of a MB for rounding."""
    return sum(sizes.values()) * min(CHOICES.values()) / 8 + MB / 10


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
        answers = ask_all(served.url, [question(r["instruction"], model=name) for r in records])
    return Score(tuple(keyword_hit(a.text, r["expected_keyword"])
                       for a, r in zip(answers, records, strict=True)),
                 tuple(a.text for a in answers))
