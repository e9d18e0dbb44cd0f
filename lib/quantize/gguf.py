"""GGUF files for llama.cpp: models with any type for each tensor, and adapters.

llama.cpp rotates neighbouring rows of queries and keys where transformers rotates row i with
row i + d/2 of a head of size d. So the rows of q and k, and those of their B, are permuted.
"""

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from lib.base.embedded import EMBEDDED, MODEL_CACHE, embedded_gguf
from lib.base.model import CHAT_TEMPLATE, dequantized_base, load_model, load_tokenizer
from lib.errors import require
from lib.files import replacing, require_free, writing
from lib.quantize.formats import encode
from lib.quantize.merging import merge
from lib.serve.bundle import Reader, model_reader
from lib.train.lora import adapter_factors, origin

NAMES = functools.cache(gguf.get_tensor_name_map)
Encoded = tuple[str, np.ndarray]  # a GGUF type, and the rows of a matrix in it
OTHER_VOCABULARY = ("only models with the embedded model's vocabulary are exported: "
                    "convert others with llama.cpp's convert_hf_to_gguf.py")


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads * d, columns) in llama.cpp's order: i and i + d/2 of a head become neighbours."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)


def write_model(model: PreTrainedModel, out: Path, *, gguf_type: str = "Q8_0",
                encoded: Mapping[str, Encoded] | None = None, base: str = EMBEDDED,
                template: str = CHAT_TEMPLATE) -> None:
    """Write a merged or plain Llama model as one GGUF file; norms stay F32.

    Matrices get `gguf_type`, one of `GGUF_TYPES`, unless `encoded` has them, by module, in a
    type of their own. `base` names these weights; an adapter must carry the same name.
    """
    config, encoded = model.config, encoded or {}
    require(config.model_type == "llama",
            f"only Llama models are exported, this is {config.model_type!r}")
    state = {name.removesuffix(".weight"): t for name, t in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head", None)
    with _writer(out, "model", base) as writer:
        _add_config(writer, config)
        for key, value, types in _tokenizer():
            require(not key.endswith(".tokens") or len(value) == config.vocab_size,
                    OTHER_VOCABULARY)
            writer.add_key_value(key, value, *types)
        writer.add_chat_template(template)
        for name, weight in state.items():
            chosen = gguf_type if weight.dim() > 1 else "F32"
            stored, data = encoded.get(name) or (chosen, encode(weight, chosen, name=name))
            _add(writer, name, (stored, data), config)


def write_adapter(adapter: Path | str, out: Path, config: PretrainedConfig, *,
                  base: str = EMBEDDED) -> None:
    """Write a PEFT adapter as a GGUF LoRA (float16) for a model of this config.

    llama.cpp adds scale * (alpha / r) B (A x); the alpha written gives the adapter's own scale.
    """
    factors = adapter_factors(adapter)
    rank, scale = next((a.shape[0], scale) for a, _, scale in factors.values())
    with _writer(out, "adapter", base) as writer:
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", scale * rank)
        for name, (a, b, _) in factors.items():
            for end, factor in ((".lora_a", a), (".lora_b", b)):
                _add(writer, name, ("F16", encode(factor, "F16", name=name)), config, end)


def export(out: Path, *, gguf_type: str = "Q8_0", route: str = "", merged: Path | None = None,
           adapters: Mapping[str, Path] | None = None, model: str = "",
           weights: PreTrainedModel | None = None,
           encoded: Mapping[str, Encoded] | None = None) -> None:
    """Write the folder that `python -m lib serve` serves: a model file, adapters beside it.

    Args:
        gguf_type, encoded: as in `write_model`.
        route: the base as in `merge`, "original" or "dequantized" (for QLoRA adapters); by
            default the one that the adapters were trained on.
        merged, adapters: one to fold in before quantising, or several to keep, by name.
        model: by default the adapters' base, or the embedded one without adapters.
        weights: what `merge` returned for `merged` and this route, or the base.
    """
    adapters = adapters or {}
    require(route in ("", "original", "dequantized"),
            f"unknown route {route!r}: use original or dequantized")
    encode(torch.zeros(1, 32), gguf_type)  # an unknown type is refused before the work
    sources = [*([merged] if merged else []), *adapters.values()]
    require_free(out, *sources, MODEL_CACHE if model in ("", EMBEDDED) else model)
    for name in adapters:
        require(re.fullmatch(r"\w[\w.-]*", name) and name not in ("base", "model"),
                f"adapter name {name!r} cannot name a file beside the model: use letters and "
                "digits, and neither base nor model")
    require(not (merged and adapters),
            "adapters are made for the plain base: fold one in, or keep them beside it")
    named, chosen, uses = model, route, set()
    for adapter in sources:
        base, own = origin(adapter)
        model, route = named or base, chosen or own
        uses.add((model, route))
        require(model, f"{adapter} does not say what it was trained on: name its base with --model")
        alike = not base or model == base or Path(base).absolute() == Path(model).absolute()
        require(alike, f"{adapter} was trained on {base}, not on {model}: name its base")
        require(route, f"{adapter} does not say how it was trained: name --route dequantized "
                "(after QLoRA) or original")
        require(not own or own == route, f"{adapter} was trained on the {own} weights, not on the "
                f"{route} ones: use --route {own}, or export it apart")
    require(len(uses) < 2, f"the adapters were trained on {' and '.join(map(' '.join, uses))} "
            "weights: export them apart")
    model, route = model or EMBEDDED, route or "original"
    if model != EMBEDDED:
        own, ours = load_tokenizer(model), load_tokenizer()
        require(own.get_vocab() == ours.get_vocab() and own.eos_token == ours.eos_token
                and own.bos_token == ours.bos_token, OTHER_VOCABULARY)
    templates = {load_tokenizer(str(s) if (s / "tokenizer.json").is_file() else model).chat_template
                 for s in map(Path, sources or [model])}
    require(len(templates) == 1, "the adapters were trained in different chat templates, and a "
            "model file has one: export them apart")
    if weights is None:
        weights = (merge(merged, route=route, model=model) if merged
                   else dequantized_base(model) if route == "dequantized"
                   else load_model(model, dtype=torch.float32))
    base = f"{model} {route}" + (f" + {merged.name}" if merged else "")
    files = {name: f"{name}.gguf" for name in adapters}
    with writing(out, name=merged.name if merged else "base", model="model.gguf",
                 adapters=files, kind=gguf_type, base=base) as part:
        write_model(weights, part / "model.gguf", gguf_type=gguf_type, encoded=encoded, base=base,
                    template=templates.pop())
        for name, adapter in adapters.items():
            write_adapter(adapter, part / files[name], weights.config, base=base)
        model_reader(part / "model.gguf", {name: part / file for name, file in files.items()})


@contextlib.contextmanager
def _writer(out: Path, content: str, base: str) -> Iterator[gguf.GGUFWriter]:
    """A writer whose file appears under its name only when it is whole."""
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base)
    writer.add_type(content)
    yield writer
    with replacing(out) as part:
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add_config(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    rope = config.rope_parameters
    require(rope["rope_type"] == "default",
            f"rope scaling {rope['rope_type']!r} is not exported: use an unscaled model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


@functools.cache
def _tokenizer() -> list[tuple[str, Any, list[gguf.GGUFValueType]]]:
    """(key, value, types) of the embedded file's tokenizer."""
    with embedded_gguf() as path:
        # The reader gets no name: Windows does not delete a file that is mapped.
        return [(key, field.contents(), field.types[:2])
                for key, field in Reader(path).fields.items()
                if key.startswith("tokenizer.ggml.")]


def _add(writer: gguf.GGUFWriter, module: str, encoded: Encoded, config: PretrainedConfig,
         end: str = "") -> None:
    """Add a tensor under llama.cpp's name, rows of q and k permuted (not those of an A)."""
    name = NAMES(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers).get_name(
        f"{module}.weight", try_suffixes=(".weight",))
    require(name, f"GGUF has no place for {module} in a Llama of {config.num_hidden_layers} "
            "blocks: only plain Llama models are exported, and adapters that fit")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    gguf_type, data = encoded
    kind = module.rpartition(".")[2]
    if kind in heads and end != ".lora_a":
        data = permute(data, heads[kind])
    writer.add_tensor(f"{name}{end}", data, raw_dtype=gguf.GGMLQuantizationType[gguf_type])
