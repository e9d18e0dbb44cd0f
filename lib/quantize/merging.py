"""From adapter to one model: merge in full precision, quantise once."""

import warnings
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from lib.base.embedded import EMBEDDED
from lib.base.model import dequantized_base, load_model, load_tokenizer, quantized_config
from lib.errors import UserError, require
from lib.files import read_json, verified, write_json, writing
from lib.train.lora import load_adapter, origin

ROUTES = ("original", "dequantized", "through_4bit")
INT8_THRESHOLD = 6.0  # columns whose activations exceed it are computed in 16 bits


def merge(adapter: Path | str, *, route: str = "original", model: str = "") -> PreTrainedModel:
    """A model, by default the adapter's base, with the adapter folded in: W' = W + (alpha / r) B A.
    The route says which W. "original": the base in float32. "dequantized": the NF4 base in
    float32, which a QLoRA adapter was trained on. "through_4bit": peft's merge into the NF4
    layers, which rounds the sum to 4 bits again. Returned in float32, the last in NF4."""
    require(route in ROUTES, f"unknown route {route!r}: use one of {', '.join(ROUTES)}")
    model = model or origin(adapter)[0] or EMBEDDED
    base = (load_model(model, quantization_config=quantized_config()) if route == "through_4bit"
            else dequantized_base(model) if route == "dequantized"
            else load_model(model, dtype=torch.float32))
    adapted = load_adapter(base, adapter)
    ends = adapted.get_input_embeddings(), adapted.get_output_embeddings()
    require(not (base.config.tie_word_embeddings and any(hasattr(m, "lora_A") for m in ends)),
            f"{adapter} adapts the embedding or the head, which this model has in one matrix: "
            "merged, it would change both; serve it unmerged")
    try:
        return adapted.merge_and_unload().eval()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"peft cannot merge {adapter} ({error}): serve it unmerged") from error


def save_model(model: PreTrainedModel, out: Path, *, tokenizer_of: str = "embedded",
               dtype: torch.dtype | None = torch.float16) -> None:
    """Write weights and tokenizer as one artifact, in float16 or as they are (None)."""
    state = model.state_dict()
    if dtype is not None:
        converted: dict[int, torch.Tensor] = {}  # tied tensors stay tied: they are written once
        for name, tensor in state.items():
            if tensor.is_floating_point():
                state[name] = converted.setdefault(tensor.data_ptr(), tensor.to(dtype))
                fits = state[name].isfinite().all()
                require(fits, f"{name} has a weight that {dtype} cannot hold: use dtype=None")
    with writing(out, parameters=model.num_parameters()) as part:
        model.save_pretrained(part, state_dict=state if dtype else None)
        if dtype is not None:
            config = read_json(part / "config.json")
            write_json(part / "config.json", config | {"dtype": str(dtype).split(".")[1]})
        load_tokenizer(tokenizer_of).save_pretrained(part)


def load_saved(directory: Path | str, **options: object) -> PreTrainedModel:
    """A model that `save_model` wrote, its files verified first."""
    verified(Path(directory))
    return load_model(str(directory), **options)


def load_dynamic_int8(directory: Path | str) -> PreTrainedModel:
    """A saved model in torch's dynamic INT8: weights rounded now, activations at each call."""
    model = load_saved(directory, dtype=torch.float32)
    with warnings.catch_warnings(action="ignore"):  # that it will move to another package
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def save_quantized(merged: Path, out: Path, bits: int) -> None:
    """A merged model as bitsandbytes quantises it, saved: LLM.int8 (8 bits) or NF4 (4).
    LLM.int8: int8 weights, a scale a row (Dettmers et al. 2022). NF4: with double quantisation."""
    config = quantized_config() if bits == 4 else BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_threshold=INT8_THRESHOLD)
    # From the file's own float16: bfloat16 would drop three of its bits first.
    model = load_saved(merged, quantization_config=config, dtype=torch.float16)
    save_model(model, out, tokenizer_of=str(merged), dtype=None)
