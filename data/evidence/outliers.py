"""The outlier columns of LLM.int8 in the merged model: how many, and what they do (T11)."""

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from lib.base.model import load_tokenizer
from lib.base.records import encode, sensors
from lib.evaluate.scores import held_out_loss
from lib.quantize.merging import INT8_THRESHOLD, load_saved
from lib.train.lora import linear_shapes

# q, k and v share an input, and so do gate and up.
FED = {"q_proj": ("q_proj", "k_proj", "v_proj"), "o_proj": ("o_proj",),
       "gate_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
WATCHED, SCORED, GROUP = 8, 100, 10


@torch.inference_mode()
def inputs_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """{layer: (tokens, width)} of what its linear layers see on a few examples."""
    seen: dict[str, list[Tensor]] = {
        name: [] for name, _ in model.named_modules() if name.split(".")[-1] in FED}
    hooks = [model.get_submodule(name).register_forward_pre_hook(
        lambda _, args, kept=kept: kept.append(args[0][0])) for name, kept in seen.items()]
    for record in sensors("validation", WATCHED):
        model(torch.tensor([encode(load_tokenizer(), record)[0]]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def int8_error(x: Tensor, w: Tensor, threshold: float) -> float:
    """Median over tokens of the INT8 product's relative error; outlier columns stay in float.

    As in notebook 03: both factors in whole numbers of -127 to 127, with a scale for each row.
    """
    loud, exact = (x.abs() >= threshold).any(0), x @ w.T
    inputs, weights = _rounded(x.masked_fill(loud, 0)), _rounded(w)
    product = inputs @ weights.T + x[:, loud] @ weights[:, loud].T
    return float(((product - exact).norm(dim=1) / exact.norm(dim=1)).median())


def _rounded(rows: Tensor) -> Tensor:
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (rows / scale).round() * scale


@torch.inference_mode()
def columns(model: PreTrainedModel) -> dict[str, Any]:
    """Share of outlier columns and products, and the layers' errors with them in INT8 or out."""
    seen, shapes = inputs_of(model), linear_shapes(model.config)
    loud = {name: (x.abs() >= INT8_THRESHOLD).any(0) for name, x in seen.items()}
    apart = sum(int(mask.sum()) * shapes[part][0] for name, mask in loud.items()
                for part in FED[name.split(".")[-1]])
    every = model.config.num_hidden_layers * sum(o * i for o, i in shapes.values())
    ratios = [int8_error(seen[name], w, math.inf) / int8_error(seen[name], w, INT8_THRESHOLD)
              for name, mask in loud.items()
              if mask.any() for w in [model.get_submodule(name).weight]]
    return {"inputs": len(loud), "with_outliers": sum(bool(m.any()) for m in loud.values()),
            "columns": {kind: statistics.mean(float(m.float().mean()) for n, m in loud.items()
                                              if n.endswith(kind)) for kind in FED},
            "products_in_8_bits": 1 - apart / every,
            "error_ratio": statistics.median(ratios), "error_ratios": sorted(ratios)}


def losses(model: PreTrainedModel) -> list[float]:
    """Held-out loss of each ten examples."""
    records, tokenizer = sensors("validation", SCORED), load_tokenizer()
    return [held_out_loss(model, tokenizer, records[i:i + GROUP])
            for i in range(0, SCORED, GROUP)]


def outliers(directory: Path) -> dict[str, Any]:
    """Columns of the float32 model; its losses, and those of LLM.int8 with 6.0 and without."""
    model = load_saved(directory, dtype=torch.float32)
    measured = columns(model) | {"losses": {"float32": losses(model)}}
    for name, threshold in (("6.0", INT8_THRESHOLD), ("none", 0.0)):
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
        model = load_saved(directory, quantization_config=config, dtype=torch.float16)
        measured["losses"][name] = losses(model)
        measured["weights_in_float"] = sum(
            type(m) is nn.Linear for n, m in model.named_modules() if n.endswith("_proj"))
    return measured
