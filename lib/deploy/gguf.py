"""From a budget of bytes to a server's files: a type for each matrix of a GGUF file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib.base.embedded import EMBEDDED, embedded_gguf
from lib.base.records import Record
from lib.coa.configuration import sensitivities, spend
from lib.deploy.packed import MB, TASKS, folder_size, load_base, require_budget, require_new
from lib.errors import require
from lib.evaluate.scores import Score, keyword_hit
from lib.files import ROOT
from lib.quantize.correction import WEIGHED_BY, encode_with_feedback, input_roots
from lib.quantize.formats import decode, encode, round_trip
from lib.quantize.gguf import Encoded, export
from lib.quantize.merging import merge
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
    """What was written, and how good it is; sizes of all files in MB (10^6 bytes)."""

    types: dict[str, int]  # how many matrices have each type
    predicted_mb: float
    actual_mb: float
    bits: float  # a weight, of all that is written, tokenizer included
    score: Score  # of validation answers through the server

    def __str__(self) -> str:
        types = ", ".join(f"{count} in {name}" for name, count in self.types.items() if count)
        return f"{self.bits:.2f} bits a weight: {types}\nvalidation: {self.score}"


def deploy_gguf(task: str, budget_mb: float, out: Path, *, examples: int = 32,
                model: str = EMBEDDED, folder: Path = ROOT / "data") -> DeployedGguf:
    """Write what `python -m lib serve` serves under the budget: the adapter folded in, rounded.

    `examples` validation answers are scored; `folder` has `adapters/TASK_qlora`, of all linears.
    UserError for bad arguments or a budget too small or too large; nothing is written.
    """
    require_new(task, budget_mb, out)
    base, adapter = load_base(model), folder / "adapters" / f"{task}_qlora"
    linears = base.layers.names
    require(adapter_factors(adapter).keys() == {*linears},
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
    weights = merge(adapter, route="dequantized", model=model)
    matrices = {name: weights.get_submodule(name).weight.data for name in names}
    # The inputs with the adapter at work: those of the base alone differ.
    roots = dict(zip(linears, input_roots(
        weights, linears, TASKS[task]("train", WEIGHED_BY), name=model), strict=True))
    encoded, size = encode_within(room, matrices, felt, roots)
    export(out, weights=weights, encoded=encoded, model=model, route="dequantized", merged=adapter)
    chosen = [gguf_type for gguf_type, _ in encoded.values()]
    actual = folder_size(out)
    return DeployedGguf({name: chosen.count(name) for name in CHOICES},
                        budget_mb - (room - size) / MB, actual / MB, 8 * actual / parameters,
                        served_score(out, TASKS[task]("validation", examples)))


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
        errors["Q4_0"] *= float(ours.square().sum() / (differences["Q4_0"] @ root).square().sum())
    return [error * felt * weight.numel() / part.numel() for error in errors.values()]


def served_score(path: Path, records: Sequence[Record], name: str = "") -> Score:
    """Keyword score of a server's answers, by the adapter of this name if any."""
    with running(path) as served:
        answers = ask_all(served.url, [question(r["instruction"], model=name) for r in records])
    texts = tuple(answer.text for answer in answers)
    return Score(tuple(keyword_hit(text, record["expected_keyword"])
                       for text, record in zip(texts, records, strict=True)), texts)
