"""Parameters and sizes of models with 7 billion parameters (T1 to T4, T9, T10, T13).

No weights are needed: shapes are counted by formula, and again on PyTorch's `meta` device,
where a tensor has a shape but no memory. What can be checked on the course's small model is
checked there.
"""

import warnings
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from lib.base.embedded import EMBEDDED, locate
from lib.errors import require
from lib.quantize.formats import Format
from lib.settings import TARGETS, TrainSettings
from lib.train.lora import count_adapter, count_trainable, delta_weight, linear_shapes, lora_config

RANK, ALPHA, TUTORIAL = 16, 32, "Llama-2-7B"
# Shapes of the published configurations; (key-value heads, inner width, vocabulary).
SHAPES = {TUTORIAL: (32, 11008, 32000), "Mistral-7B": (8, 14336, 32000),
          "Llama-3-8B": (8, 14336, 128256)}
# The tutorial's batch of training, and a context to answer from.
BATCH, TOKENS = 4, 2048
# Memory in GB of the devices that the tutorial names.
DEVICES = {"Jetson Nano": 4, "RTX 3060": 12}


def config_of(name: str) -> LlamaConfig:
    """Configuration of one of the models of `SHAPES`."""
    heads, inner, vocabulary = SHAPES[name]
    return LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
                       num_key_value_heads=heads, intermediate_size=inner,
                       vocab_size=vocabulary)


def parts(config: PretrainedConfig) -> tuple[int, int, int]:
    """Weights of the blocks' linear layers, their output rows, and all other weights."""
    shapes, layers = linear_shapes(config).values(), config.num_hidden_layers
    tables = 1 if config.tie_word_embeddings else 2
    beside = (tables * config.vocab_size + 2 * layers + 1) * config.hidden_size
    return layers * sum(o * i for o, i in shapes), layers * sum(o for o, _ in shapes), beside


def counts(name: str) -> dict[str, Any]:
    """Parameters of a model and its adapters; `peft` counts a real model on `meta`."""
    config, settings = config_of(name), TrainSettings(targets="standard", rank=RANK)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        parameters = model.num_parameters()
        counted, _ = count_trainable(get_peft_model(model, lora_config(model, settings)))
    linears, _, beside = parts(config)
    adapters = {target: count_adapter(config, rank=RANK, modules=modules)
                for target, modules in TARGETS.items()}
    require((parameters, counted) == (linears + beside, adapters["standard"]),
            f"{name}: the formulas do not count what peft made: correct them")
    # Two 4-bit weights share a byte, so a count of entries takes them at half.
    return {"parameters": parameters, "packed": linears // 2 + beside, "peft": counted,
            "adapters": adapters}


def memory(config: PretrainedConfig) -> dict[str, dict[str, float]]:
    """GB of weights, gradients and Adam's moments; activations are left out (T2)."""
    linears, _, beside = parts(config)
    every, adapter = linears + beside, count_adapter(
        config, rank=RANK, modules=TARGETS["standard"])
    double = Format(4, 8, "fp32", 64, 256).bits_per_parameter / 8
    recipes = {  # bytes: base in 16 or 4 bits, in float32, gradients, Adam's moments
        "full, mixed precision": (2 * every, 4 * every, 2 * every, 8 * every),
        "full, pure bf16": (2 * every, 0, 2 * every, 4 * every),
        "LoRA": (2 * every, 4 * adapter, 4 * adapter, 8 * adapter),
        "QLoRA": (double * linears + 2 * beside, 4 * adapter, 4 * adapter, 8 * adapter),
        # Without double quantisation; what is not in the blocks is converted to float32.
        "QLoRA, tutorial's code": ((4 + 32 / 64) / 8 * linears,
                                   4 * beside + 4 * adapter, 4 * adapter, 8 * adapter)}
    names = ("base", "float32", "gradients", "moments")
    return {recipe: dict(zip(names, (x / 1e9 for x in sizes), strict=True))
            | {"sum": sum(sizes) / 1e9} for recipe, sizes in recipes.items()}


def files(config: PretrainedConfig, targets: str) -> dict[str, float]:
    """Bytes of adapter, merged model and INT8 model on disk (T10).

    INT8 keeps a float32 scale for each row, and everything outside the blocks in 16 bits.
    """
    linears, rows, beside = parts(config)
    adapter = count_adapter(config, rank=RANK, modules=TARGETS[targets])
    return {"adapter, float32": 4 * adapter, "adapter, float16": 2 * adapter,
            "merged": 2 * (linears + beside), "int8": linears + 4 * rows + 2 * beside}


def cache_bytes(config: PretrainedConfig, tokens: int = TOKENS) -> int:
    """Bytes of keys and values in 16 bits."""
    keys = linear_shapes(config)["k_proj"][0]
    return 2 * config.num_hidden_layers * keys * tokens * 2


def update() -> dict[str, Any]:
    """Which formula gives the weight that peft merges: W + BA, or W + (alpha / r) BA (T3).

    Errors are relative to the update; the layer is as wide as the tutorial's.
    """
    torch.manual_seed(0)
    width = config_of(TUTORIAL).hidden_size
    model = get_peft_model(nn.ModuleDict({"q_proj": nn.Linear(width, width, bias=False)}),
                           LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj"],
                                      init_lora_weights=False))
    layer = model.base_model.model["q_proj"]
    a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    before = layer.base_layer.weight.data.clone()
    layer.merge()
    moved = layer.base_layer.weight.data - before
    return {"A": list(a.shape), "B": list(b.shape), "scale": ALPHA / RANK,
            "error_without_scale": _error(b @ a, moved),
            "error_with_scale": _error(delta_weight(a, b, alpha=ALPHA), moved),
            "before": before.numel(), "after": a.numel() + b.numel()}


def _error(formula: torch.Tensor, moved: torch.Tensor) -> float:
    return float((formula - moved).norm() / moved.norm())


def optimizer_bytes(shapes: list[tuple[int, ...]], kind: str) -> int:
    """Bytes that an optimizer of bitsandbytes holds after a step on tensors of these shapes."""
    total = 0
    for shape in shapes:  # one at a time, so that little memory is needed
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.ones(shape)
        optimizer = getattr(bnb.optim, kind)([parameter])
        optimizer.step()
        # All tensors share the table of the 8-bit format.
        total += sum(x.numel() * x.element_size()
                     for name, x in optimizer.state[parameter].items()
                     if isinstance(x, torch.Tensor) and "qmap" not in name)
    return total


def optimizers(config: PretrainedConfig) -> dict[str, Any]:
    """MB of AdamW's state in 32 and 8 bits, measured on the small model's shapes (T9)."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        shapes = {"full": [tuple(p.shape) for p in model.parameters()]}
        adapted = get_peft_model(model, lora_config(model, TrainSettings(rank=RANK)))
        shapes["lora"] = [tuple(p.shape) for p in adapted.parameters() if p.requires_grad]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bnb.optim.PagedAdamW8bit([nn.Parameter(torch.zeros(64, 64))])
        optimizer_bytes([(64, 64)], "PagedAdamW8bit")
    return {"paged": next((str(w.message) for w in caught if "aged" in str(w.message)), ""),
            "mb": {mode: {bits: optimizer_bytes(some, kind) / 1e6
                          for bits, kind in (("32", "AdamW32bit"), ("8", "AdamW8bit"))}
                   for mode, some in shapes.items()}}


def sizes() -> dict[str, Any]:
    """Counts, memory, files, devices, the formula of the update and the optimizer's state."""
    big, small = config_of(TUTORIAL), AutoConfig.from_pretrained(locate(EMBEDDED))
    whole = files(big, "standard") | {"cache": cache_bytes(big)}
    return {"models": {name: counts(name) for name in SHAPES},
            "memory_gb": memory(big),
            # Even checkpointing keeps the input of every block, in 16 bits.
            "batch_gb": BATCH * TOKENS * 2 * big.num_hidden_layers * big.hidden_size / 1e9,
            "files_gb": {name: size / 1e9 for name, size in whole.items()},
            "embedded_mb": {n: x / 1e6 for n, x in files(small, "aggressive").items()},
            "devices_gb": DEVICES, "update": update(), "optimizers": optimizers(small)}
