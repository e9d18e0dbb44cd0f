"""From a budget of bytes to a server's files: a type for each matrix of a GGUF file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lib.base.embedded import EMBEDDED, embedded_gguf
from lib.base.model import dequantized_base
from lib.base.records import Record
from lib.coa.budgets import sensitivities, spend
from lib.deploy.packed import MB, TASKS, folder_size, load_base, require_budget, require_new
from lib.errors import require
from lib.evaluate.scores import Score, keyword_hit
from lib.files import MANIFEST, ROOT, read_json, scratch, sha256, swap, verified, writing
from lib.quantize.correction import WEIGHED_BY, encode_with_feedback, input_roots, low_rank
from lib.quantize.formats import decode, encode, round_trip
from lib.quantize.gguf import Encoded, export
from lib.serve.bundle import Reader
from lib.serve.client import ask_all, question
from lib.serve.server import running
from lib.train.lora import adapter_factors

# Bits a weight of the types that decode fast for their size. The fifth bit of Q5_0 costs
# all the speed that its bytes save, the offset of Q4_1 half of it (`data/results/engine.json`).
CHOICES = {"Q4_0": 4.5, "Q8_0": 8.5}
HEAD = "model.embed_tokens"
SAMPLE = 1 << 14
GRADIENTS = 4  # examples whose gradients weigh the errors of the matrices
MARGIN = 100_000  # bytes of our template and names beside the embedded file's own metadata


@dataclass(frozen=True)
class DeployedGguf:
    """What was written, and why; sizes of all files in MB (10^6 bytes).

    "folded" is the adapter added before quantising, "beside" one that also corrects the
    rounding of its base. Validation answers through the server choose.
    """

    way: str
    types: dict[str, int]  # how many matrices have each type
    predicted_mb: float
    actual_mb: float
    bits: float  # a weight, of all that is written, tokenizer included
    scores: dict[str, Score]

    def __str__(self) -> str:
        types = ", ".join(f"{count} in {name}" for name, count in self.types.items() if count)
        scores = "; ".join(f"{way} {score}" for way, score in self.scores.items())
        return (f"{self.bits:.2f} bits a weight: {types}\nchosen: the adapter {self.way}; "
                f"validation: {scores}")


def deploy_gguf(task: str, budget_mb: float, out: Path, *, examples: int = 32,
                model: str = EMBEDDED, folder: Path = ROOT / "data") -> DeployedGguf:
    """Write what `python -m lib serve` serves, the better of two ways under the budget.

    Args:
        examples: validation answers that choose the way.
        folder: has `adapters/TASK_qlora`, with a layer for each linear of the blocks.

    UserError for bad arguments or a budget too small or too large; nothing is written.
    """
    require_new(task, budget_mb, out)
    base, adapter = load_base(model), folder / "adapters" / f"{task}_qlora"
    verified(adapter)
    linears, factors = base.layers.names, adapter_factors(adapter)
    require(factors.keys() == {*linears},
            f"{adapter} does not adapt each linear layer: train one with targets aggressive")
    names, parameters = (*linears, HEAD), base.model.num_parameters()
    weights_in_all = sum(base.model.get_submodule(name).weight.numel() for name in names)
    with embedded_gguf() as path:
        fixed = Reader(path).data_offset + MARGIN + 4 * (parameters - weights_in_all)
    # A tenth of a MB is for rounding.
    room, smallest = budget_mb * MB - fixed, weights_in_all * min(CHOICES.values()) / 8 + MB / 10
    require_budget(budget_mb, fixed + smallest, 2 * parameters)
    felt = dict(zip(names, sensitivities(
        base, TASKS[task]("train", GRADIENTS), more=(HEAD,)).tolist(), strict=True))
    del base
    weights = dequantized_base(model)
    plain = {name: weights.get_submodule(name).weight.data for name in names}
    folded = plain | {name: plain[name] + (b @ a) * scale
                      for name, (a, b, scale) in factors.items()}
    for name in linears:
        weights.get_submodule(name).weight.data = folded[name]
    # The inputs with the adapter at work: those of the base alone differ.
    roots = dict(zip(linears, input_roots(
        weights, linears, TASKS[task]("train", WEIGHED_BY), name=model), strict=True))
    beside_room = room - (adapter / "adapter_model.safetensors").stat().st_size - MARGIN
    types, predictions, scores = {}, {}, {}
    with scratch(out) as work:
        for way, matrices, left in (("folded", folded, room), ("beside", plain, beside_room)):
            if left < smallest:
                continue  # only the adapter inside the weights fits
            encoded, size = encode_within(left, matrices, felt, roots)
            beside = {task: work / "adapter" / task} if way == "beside" else {}
            if beside:
                write_correction(adapter, beside[task], plain, encoded, roots)
            export(work / way, weights=weights, encoded=encoded, model=model, route="dequantized",
                   merged=None if beside else adapter, adapters=beside)
            chosen = [gguf_type for gguf_type, _ in encoded.values()]
            types[way] = {name: chosen.count(name) for name in CHOICES}
            predictions[way] = budget_mb - (left - size) / MB
            scores[way] = served_score(work / way, TASKS[task]("validation", examples),
                                       task if beside else "")
        best = max(scores, key=lambda way: scores[way].share)
        swap(work / best, out)
    size = folder_size(out)
    return DeployedGguf(best, types[best], predictions[best], size / MB, 8 * size / parameters,
                        scores)


def encode_within(room: float, matrices: Mapping[str, Tensor], felt: Mapping[str, float],
                  roots: Mapping[str, Tensor]) -> tuple[dict[str, Encoded], float]:
    """({module: matrix in its type}, their bytes): the least error in `room` bytes.

    `felt` has the loss's sensitivity to each matrix; Q4_0 rounds those with `roots` with feedback.
    """
    q4_0 = encode_with_feedback({name: matrices[name] for name in roots}, roots)
    errors = [type_errors(weight, felt[name], q4_0.get(name), roots.get(name))
              for name, weight in matrices.items()]
    sizes = torch.tensor([weight.numel() for weight in matrices.values()])
    costs = sizes[:, None] * torch.tensor([*CHOICES.values()]) / 8
    columns = spend(torch.tensor(errors), costs, room)
    encoded = {}
    for (name, weight), column in zip(matrices.items(), columns, strict=True):
        gguf_type = [*CHOICES][column]
        data = q4_0.get(name) if gguf_type == "Q4_0" else None
        encoded[name] = gguf_type, encode(weight, gguf_type, name=name) if data is None else data
    return encoded, float(costs[range(len(columns)), columns].sum())


def type_errors(weight: Tensor, felt: float, q4_0: np.ndarray | None = None,
                root: Tensor | None = None) -> list[float]:
    """Squared error times sensitivity of a matrix in each type, from a sample of its rows.

    Rounding with feedback (`q4_0`) errs more, but in directions that the inputs lack. So the
    error of Q4_0 is scaled by what feedback does to the layer's outputs.
    """
    rows = slice(None, None, max(1, weight.numel() // SAMPLE))
    part = weight[rows][:64].float()
    differences = {name: round_trip(part, name) - part for name in CHOICES}
    errors = {name: float(difference.square().sum()) for name, difference in differences.items()}
    if q4_0 is not None and errors["Q4_0"]:
        ours = (decode(q4_0[rows][:64], "Q4_0") - part) @ root
        errors["Q4_0"] *= float(ours.square().sum() /
                                (differences["Q4_0"] @ root).square().sum())
    return [error * felt * weight.numel() / part.numel() for error in errors.values()]


@torch.no_grad()
def write_correction(adapter: Path, out: Path, weights: Mapping[str, Tensor],
                     encoded: Mapping[str, Encoded], roots: Mapping[str, Tensor]) -> None:
    """Write an adapter for the base as the file holds it: what outputs feel of W + dW - Q(W)."""
    tensors = {}
    for module, (a, b, scale) in adapter_factors(adapter).items():
        gguf_type, data = encoded[module]
        error = weights[module].float() + scale * b @ a - decode(data, gguf_type)
        b, a = low_rank(error, roots[module], a.shape[0])
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.half().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.half().contiguous()
    config = read_json(adapter / "adapter_config.json")
    with writing(out, made_from=sha256(adapter / MANIFEST)) as part:
        save_file(tensors, part / "adapter_model.safetensors")
        (part / "adapter_config.json").write_text(json.dumps(
            config | {"lora_alpha": config["r"], "use_rslora": False}), encoding="utf-8")


def served_score(path: Path, records: Sequence[Record], name: str = "") -> Score:
    """Keyword score of a server's answers, by the adapter of this name if any."""
    with running(path) as served:
        answers = ask_all(served.url, [question(r["instruction"], model=name) for r in records])
    return Score(tuple(keyword_hit(answer.text, record["expected_keyword"])
                       for answer, record in zip(answers, records, strict=True)),
                 tuple(answer.text for answer in answers))
