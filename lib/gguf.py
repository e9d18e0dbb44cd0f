"""GGUF files for llama.cpp: models with any type per tensor, and adapters.

llama.cpp names Llama's tensors its own way, and it turns queries and keys by
pairs of neighbouring rows where transformers pairs row i with row i + d/2 of
a head of size d. So the rows of q and k change places, and those of their B.
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

from lib.artifacts import require_free, verified, writing
from lib.base_model import CHAT_TEMPLATE, load_model, load_tokenizer
from lib.bundle import Reader, opened
from lib.embedded import EMBEDDED, embedded_gguf, place
from lib.errors import UserError, require
from lib.lora import adapter_factors
from lib.merge import ROUTES, dequantized_base, merge
from lib.scratch import replacing

# What the pure-Python writer makes; bits a weight: 32, 16, 8.5, 6, 5.5, 5, 4.5.
TYPES = ("F32", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
OTHER_WORDS = ("only models with the embedded model's vocabulary are exported: "
               "convert others with llama.cpp's convert_hf_to_gguf.py")


def known(kind: str) -> None:
    """UserError unless the writer makes this type."""
    require(kind in TYPES, f"unknown tensor type {kind!r}: use one of {', '.join(TYPES)}")


def tensor_name(name: str, blocks: int) -> str:
    """llama.cpp's name of a tensor of transformers' Llama."""
    found = _names(blocks).get_name(name, try_suffixes=(".weight",))
    require(found, f"GGUF has no place for {name} in a Llama of {blocks} blocks: "
            "only plain Llama models are exported, and adapters that fit")
    return found


@functools.cache
def _names(blocks: int) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in llama.cpp's order: i and i + d/2 of a head become neighbours.

    Args:
        rows: (heads * d, columns), a weight or the B of an adapter.
        heads: query heads for q, key-value heads for k.
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)


def save_model(model: PreTrainedModel, out: Path, *, kind: str = "Q8_0",
               plan: Mapping[str, str] | None = None, base: str = EMBEDDED) -> None:
    """Write a merged or plain Llama model as one GGUF file.

    Args:
        model: unquantised, with the embedded model's vocabulary.
        out: the file; written beside and renamed.
        kind: type of every matrix, one of `TYPES`. Norms stay F32.
        plan: types of single modules ("model.layers.0.mlp.up_proj",
            "model.embed_tokens"), so that a bit plan becomes a file.
        base: what these weights are called; an adapter must carry the same.

    Raises:
        UserError: unknown type or module, rows that blocks of 32 do not
            divide, another architecture or vocabulary, an unwritable place.
    """
    config, plan = model.config, dict(plan or {})
    require(config.model_type == "llama",
            f"only Llama models are exported, this is {config.model_type!r}")
    state = {n.removesuffix(".weight"): t for n, t in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head", None)
    lacking = plan.keys() - state.keys()
    require(not lacking, f"the plan names {', '.join(sorted(lacking))}: no such module")
    with _writing(out, base) as writer:
        writer.add_type("model")
        _add_config(writer, config)
        _add_tokenizer(writer, config.vocab_size)
        for name, tensor in state.items():
            rows = _turned(name, tensor.detach().float().cpu().numpy(), config)
            _add(writer, tensor_name(f"{name}.weight", config.num_hidden_layers), rows,
                 plan.get(name, kind) if rows.ndim > 1 else "F32")


def save_adapter(adapter: Path | str, out: Path, config: PretrainedConfig, *,
                 base: str = EMBEDDED) -> None:
    """Write a PEFT adapter as a GGUF LoRA (float16) for a model of this config.

    llama.cpp adds scale * (alpha / r) B (A x), with r from the shapes. The
    alpha written gives the adapter's own scale, rsLoRA's included.
    """
    factors = adapter_factors(adapter)
    rank, scale = next((a.shape[0], s) for a, _, s in factors.values())
    with _writing(out, base) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", scale * rank)
        for module, (a, b, _) in factors.items():
            name = tensor_name(f"{module}.weight", config.num_hidden_layers)
            _add(writer, f"{name}.lora_a", a.numpy(), "F16")
            _add(writer, f"{name}.lora_b", _turned(module, b.numpy(), config), "F16")


def export(out: Path, *, kind: str = "Q8_0", route: str = "dequantized",
           merged: Path | None = None, adapters: Mapping[str, Path] | None = None,
           model: str = EMBEDDED, weights: PreTrainedModel | None = None,
           plan: Mapping[str, str] | None = None) -> None:
    """Write what `python -m lib serve` serves: a model file, adapters beside it.

    Args:
        out: directory of the artifact.
        kind: type of the model's matrices, one of `TYPES`.
        route: which base, as in `lib.merge.merge`: "original", or
            "dequantized", the one that QLoRA adapters were trained on.
        merged: an adapter to fold in before quantising.
        adapters: adapters to keep beside the model, by name.
        weights: what `merge` made of `merged` by this route, or the base, if
            it is there already.
        plan: types of single modules, as in `save_model`.
    """
    require(route in ROUTES[:2], f"unknown route {route!r}: use {' or '.join(ROUTES[:2])}")
    known(kind)
    sources = [*([merged] if merged else []), *(adapters or {}).values()]
    require_free(out, *sources, place(model))
    for name in adapters or {}:
        require(re.fullmatch(r"\w[\w.-]*", name) and name not in ("base", "model"),
                f"adapter name {name!r} makes no file beside the model: use letters and "
                "digits, and neither base nor model")
    require(not (merged and adapters), "adapters are made for the plain base: "
            "fold one in, or keep them beside it")
    for adapter in sources:
        verified(adapter)
    if model != EMBEDDED:
        words, ours = (load_tokenizer(m).get_vocab() for m in (model, EMBEDDED))
        require(words == ours, OTHER_WORDS)
    if merged:
        weights = weights or merge(merged, route=route, model=model)
    else:
        weights = weights or (dequantized_base(model) if route == "dequantized"
                              else load_model(model, dtype=torch.float32))
    base = f"{model} {route}" + (f" + {merged.name}" if merged else "")
    files = {name: f"{name}.gguf" for name in adapters or {}}
    with writing(out, name=merged.name if merged else "base", model="model.gguf",
                 adapters=files, kind=kind, base=base) as part:
        save_model(weights, part / "model.gguf", kind=kind, plan=plan, base=base)
        for name, adapter in (adapters or {}).items():
            save_adapter(adapter, part / files[name], weights.config, base=base)
        opened(part / "model.gguf", {n: part / file for n, file in files.items()})


def _turned(module: str, rows: np.ndarray, config: PretrainedConfig) -> np.ndarray:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    kind = module.split(".")[-1]
    return permute(rows, heads[kind]) if kind in heads else rows


@contextlib.contextmanager
def _writing(out: Path, base: str) -> Iterator[gguf.GGUFWriter]:
    """A writer whose file appears under its name only when it is whole."""
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base)
    yield writer
    with replacing(out) as part:
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add_config(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    require(rope["rope_type"] == "default",
            f"rope scaling {rope['rope_type']!r} is not exported: use an unscaled model")
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, vocabulary: int) -> None:
    """The embedded file's tokenizer, with the course's chat template."""
    for key, value, kinds in _tokenizer():
        require(not key.endswith(".tokens") or len(value) == vocabulary, OTHER_WORDS)
        writer.add_key_value(key, value, *kinds)
    writer.add_chat_template(CHAT_TEMPLATE)


@functools.cache
def _tokenizer() -> list[tuple[str, Any, list[gguf.GGUFValueType]]]:
    with embedded_gguf() as path:
        # The reader is given no name: Windows deletes no file that is mapped.
        return [(key, field.contents(), field.types[:2])
                for key, field in Reader(path).fields.items()
                if key.startswith("tokenizer.ggml.")]


def _add(writer: gguf.GGUFWriter, name: str, rows: np.ndarray, kind: str) -> None:
    known(kind)
    stored = gguf.GGMLQuantizationType[kind]
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # said below
            data = gguf.quants.quantize(rows, stored)
    except gguf.quants.QuantError as error:
        raise UserError(f"{name} cannot be {kind} ({error}): use F16 for it") from None
    largest = np.abs(rows).max()
    # Scales of blocks are float16: only what is larger may be lost.
    whole = largest <= 65504 or np.isfinite(gguf.quants.dequantize(data, stored)).all()
    require(whole, f"{name} has a weight of {largest:g}, which {kind} cannot hold: "
            "use F32, or take the weights anew if they are damaged")
    writer.add_tensor(name, data, raw_dtype=stored)
