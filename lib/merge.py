"""From adapter to one model: merge in full precision, quantise once."""

import warnings
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from lib.artifacts import read_json, verified, write_json, writing
from lib.base_model import load_model, load_tokenizer
from lib.errors import require
from lib.fused import frozen_weight
from lib.lora import load_adapter
from lib.train import quantized_config

ROUTES = ("original", "dequantized", "through_4bit")
INT8_THRESHOLD = 6.0


def merge(adapter: Path | str, *, route: str = "original",
          model: str = "embedded") -> PreTrainedModel:
    """Base model with the adapter folded in: W' = W + (alpha / r) B A.

    Args:
        adapter: a saved adapter directory.
        route: which W it is added to. "original": the base in float32.
            "dequantized": float32 values of the NF4 base, the one a QLoRA
            adapter was trained on. "through_4bit": peft's merge into the NF4
            layers, which rounds the sum to 4 bits again.
        model: the base model's name.

    Returns:
        A plain model in evaluation mode; NF4 for "through_4bit", else float32.
    """
    require(route in ROUTES, f"unknown route {route!r}: use one of {', '.join(ROUTES)}")
    if route == "through_4bit":
        base = load_model(model, quantization_config=quantized_config())
    elif route == "dequantized":
        base = dequantized_base(model)
    else:
        base = load_model(model, dtype=torch.float32)
    return load_adapter(base, adapter).merge_and_unload().eval()


def dequantized_base(model: str = "embedded") -> PreTrainedModel:
    """The NF4 base written out in float32: what a QLoRA adapter was trained on."""
    quantized = load_model(model, quantization_config=quantized_config())
    base = load_model(model, dtype=torch.float32)
    layers = dict(base.named_modules())
    for name, module in quantized.named_modules():
        if type(module).__name__ == "Linear4bit":
            layers[name].weight.data = frozen_weight(module, torch.float32)
    return base


def save_model(model: PreTrainedModel, out: Path, *, tokenizer_of: str = "embedded",
               dtype: torch.dtype | None = torch.float16) -> None:
    """Write weights and tokenizer as one artifact (float16, or as they are).

    The model in memory stays as it is.
    """
    with writing(out, parameters=model.num_parameters()) as part:
        if dtype is None:
            model.save_pretrained(part)
        else:
            model.save_pretrained(part, state_dict=_converted(model, dtype))
            config = read_json(part / "config.json")
            write_json(part / "config.json", config | {"dtype": str(dtype).split(".")[1]})
        load_tokenizer(tokenizer_of).save_pretrained(part)


def _converted(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """State in another dtype; tied tensors stay tied, so they are written once."""
    state, done = model.state_dict(), {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            state[name] = done.setdefault(tensor.data_ptr(), tensor.to(dtype))
            require(state[name].isfinite().all(),
                    f"{name} has a weight that {dtype} cannot hold: use dtype=None")
    return state


def load_saved(directory: Path | str, **options: object) -> PreTrainedModel:
    """A model that `save_model` wrote, its files verified first."""
    verified(Path(directory))
    return load_model(str(directory), **options)


def load_dynamic_int8(directory: Path | str) -> PreTrainedModel:
    """A saved model with torch's dynamic INT8: weights rounded once, activations at each call."""
    model = load_saved(directory, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is to move to another package
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def save_int8(merged: Path, out: Path) -> None:
    """LLM.int8 of a merged model (Dettmers et al. 2022), saved.

    Columns whose activations exceed the threshold 6.0 are computed in 16
    bits; all weights are stored as int8 with one scale a row.
    """
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=INT8_THRESHOLD)
    _save_quantized(merged, config, out)


def save_nf4(merged: Path, out: Path) -> None:
    """NF4 with double quantisation of a merged model, saved."""
    _save_quantized(merged, quantized_config(), out)


def _save_quantized(merged: Path, config: BitsAndBytesConfig, out: Path) -> None:
    # From the file's own numbers: bfloat16 would drop three of their bits first.
    model = load_saved(merged, quantization_config=config, dtype=torch.float16)
    save_model(model, out, tokenizer_of=str(merged), dtype=None)
