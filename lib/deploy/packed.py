"""Files of packed NormalFloat weights, norms and biases in float32 among them."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lib.base.model import best_dtype, load_tokenizer
from lib.base.records import Record, render
from lib.coa.configuration import Configuration, Switchable, block_linears
from lib.errors import UserError, require
from lib.files import replacing, verified
from lib.quantize.formats import PARTS, Format, dequantize, pack_weight, quantize, unpack_weight
from lib.train.lora import load_adapter

WEIGHTS = "weights.safetensors"


def tables(model: PreTrainedModel) -> list[str]:
    """Names of the embedding, and of a head of its own."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    ends = ends[: 2 - model.config.tie_word_embeddings]
    return [name for name, module in model.named_modules() if any(module is m for m in ends)]


def save_packed(base: Switchable, configuration: Configuration, out: Path, *,
                rest: Mapping[str, Tensor] | None = None,
                table_format: Format | None = None) -> None:
    """Write the blocks' linears in their formats, and the `rest`, as one safetensors file.
    `tables` of the rest are packed in a format of their own; norms and biases are float32."""
    base.layers.require_same(configuration.layers)
    require(configuration.family == "nf", "packed files hold NormalFloat: use --format gguf")
    formats, tensors = dict(zip(base.layers.names, configuration.formats, strict=True)), {}
    packed = tables(base.model)
    weights = {name: base.weight(i) for i, name in enumerate(base.layers.names)}
    for key, tensor in (rest or {}).items():
        if (name := key.removesuffix(".weight")) in packed:
            formats[name], weights[name] = table_format, tensor
        else:
            tensors[key] = tensor.float()
    for name, fmt in formats.items():
        parts = pack_weight(quantize(weights[name], fmt))
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
    # One entry: safetensors writes several in any order, so equal files would differ.
    with replacing(out) as to:
        save_file(tensors, to, {"packed": json.dumps({n: astuple(f) for n, f in formats.items()})})


def load_packed(model: PreTrainedModel, file: Path) -> None:
    """Put a packed file's weights into a model of the same shape, in place, unpacked once.
    A product with packed weights takes many times as long (`data/results/switching.json`)."""
    require(file.is_file(), f"{file} does not exist: check the path")
    try:
        with safe_open(file, "pt") as reader:
            formats, left = json.loads((reader.metadata() or {})["packed"]), {*reader.keys()}
            require({*block_linears(model)} <= {*formats}, "some layers are not in it")
            for name, values in formats.items():
                parts = {part: reader.get_tensor(f"{name}.{part}") for part in PARTS}
                left -= {f"{name}.{part}" for part in PARTS}
                plain = model.get_submodule(name).weight
                packed = unpack_weight(parts, Format(*values), plain.numel())
                plain.data = dequantize(packed).view(plain.shape).to(plain.dtype)
            for key in left:
                model.get_parameter(key).data = reader.get_tensor(key).to(model.dtype)
    except Exception as error:  # of safetensors, of JSON, of torch for a name or a dtype
        raise UserError(f"{file} is damaged, or of another model ({error}): redo it") from error


def load_deployed(directory: Path | str) -> PeftModel:
    """The model in a folder of packed files, with its adapter."""
    directory = Path(directory)
    require(WEIGHTS in verified(directory)["files"], f"{directory} is not from `deploy`: check it")
    config = AutoConfig.from_pretrained(directory)
    model = AutoModelForCausalLM.from_config(config, dtype=best_dtype()).eval()
    load_packed(model, directory / WEIGHTS)
    return load_adapter(model, directory / "adapter")


def packed_ms(folder: Path, messages: Sequence[Record], count: int) -> float:
    """Time of each of `count` tokens of an answer, the prompt counted as the first."""
    model, tokenizer = load_deployed(folder), load_tokenizer(str(folder))
    prompt = tokenizer(render(tokenizer, messages), return_tensors="pt", add_special_tokens=False)
    start = time.perf_counter()
    model.generate(**prompt, min_new_tokens=count, max_new_tokens=count, do_sample=False)
    return 1e3 * (time.perf_counter() - start) / count
