"""The base model in NF4: how it is loaded, and how its weights are decoded."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from lib.base.model import best_dtype, load_model, release_memory
from lib.host import is_sharded


def quantized_config() -> BitsAndBytesConfig:
    """NF4 with double quantisation, computing in the machine's best dtype.

    FSDP shards floating-point tensors of one dtype only, so there the codes have that dtype.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=best_dtype(),
        bnb_4bit_quant_storage=best_dtype() if is_sharded() else torch.uint8)


def frozen_weight(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """Weight (d_out, d_in) of a linear layer, dequantised if it is 4-bit."""
    weight = base.weight
    if getattr(weight, "quant_state", None) is None:
        return weight.to(dtype)
    import bitsandbytes.functional as bnb  # only a 4-bit model needs it

    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        # Scoring has repacked the weight for another kernel: undo it, as the layer would.
        weight.data, weight.quant_state = bnb._convert_weight_packed_for_cpu_inverse(
            weight.data, weight.quant_state)
    return bnb.dequantize_4bit(weight.data, weight.quant_state).to(dtype)


@contextlib.contextmanager
def decoded(model: nn.Module) -> Iterator[None]:
    """Keep 4-bit layers on a CPU dequantised in the block; return the memory afterwards.

    Their own kernel decodes the weights again for every few rows: good for one answer,
    slow for the many rows of a score. The block needs 2 bytes for each weight.
    """
    layers = [m for m in model.modules() if hasattr(m, "compute_dtype")
              and hasattr(m.weight, "quant_state") and m.weight.device.type == "cpu"]
    for layer in layers:
        weight = frozen_weight(layer, layer.compute_dtype or torch.float32)
        layer.forward = functools.partial(_plain_forward, weight=weight, bias=layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
        release_memory()


def _plain_forward(x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(weight.dtype)
    return nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def dequantized_base(model: str = "embedded") -> PreTrainedModel:
    """The NF4 base written out in float32: what a QLoRA adapter was trained on."""
    quantized = load_model(model, quantization_config=quantized_config())
    base = load_model(model, dtype=torch.float32)
    for name, module in quantized.named_modules():
        if type(module).__name__ == "Linear4bit":
            base.get_submodule(name).weight.data = frozen_weight(module, torch.float32)
    return base
