"""The base model, in full precision or NF4, and its tokenizer: one call for every source.
"Full precision" of the default means SmolLM2-135M-Instruct in Q4_1, dequantised to float16."""

import contextlib
import ctypes
import functools
import gc
import math
import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

from lib.base.embedded import EMBEDDED, locate, quiet
from lib.base.records import IGNORED
from lib.errors import UserError, require
from lib.files import read_json, verified
from lib.host import cores, is_sharded

MODULE_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The tutorial's prompt format. It is defined only here; the tokenizer carries it.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
    "{{ '### Response:\n' + message['content'] + eos_token }}"
    "{%- elif message['role'] == 'user' -%}"
    "{{ ('' if loop.first else '\n') + '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{%- else -%}{{ message['content'] + '\n\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Response:\n' }}{%- endif -%}")


def load_tokenizer(model: str = EMBEDDED, *, template: str = "auto", base: str = ""
                   ) -> PreTrainedTokenizerBase:
    """Tokenizer with a chat template, and a pad token that is not the end token if it has one.
    The template is the course's for the embedded model and for one without a template, else the
    model's own; or "course" or "own". What an adapter's folder lacks is its base's, or `base`'s."""
    base, own = base or adapter_base(model), Path(model, "chat_template.jinja")
    if base and not has_tokenizer(model):
        tokenizer = load_tokenizer(base, template=template)
        config = Path(model, "tokenizer_config.json")
        named = read_json(config).get("chat_template") if config.is_file() else None
        tokenizer.chat_template = (own.read_text(encoding="utf-8") if own.is_file() else
                                   one_template(named, model) or tokenizer.chat_template)
        return tokenizer
    tokenizer = _load(transformers.AutoTokenizer, model)
    tokenizer.chat_template = one_template(tokenizer.chat_template, model)
    if not tokenizer.chat_template and base:  # trained in its base's
        tokenizer.chat_template = load_tokenizer(base, template=template).chat_template
    own = tokenizer.chat_template
    require(own or template != "own", f"{model} has no chat template: use --template course")
    if template == "course" or not own or (template == "auto" and model == EMBEDDED):
        tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        spare = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special
                 and t.content not in (tokenizer.eos_token, tokenizer.bos_token)]
        # One for this, or one that no text uses, or the end token: padding is never learned.
        fit = [t for t in spare if re.search("pad|unk|reserved|unused", t)]
        tokenizer.pad_token = (fit or spare or [tokenizer.eos_token])[0]
    return tokenizer


def one_template(named: Any, model: str) -> str | None:
    """The default one of several chat templates: a GGUF file has one."""
    if isinstance(named, list):  # as files have them
        named = {row["name"]: row["template"] for row in named}
    if isinstance(named, dict):
        named = named.get("default")
        require(named, f"{model} has no template 'default': rename one")
    return named


def load_model(model: str = EMBEDDED, *, dtype: torch.dtype | None = None, **options: object
               ) -> PreTrainedModel:
    """Causal language model in evaluation mode: "embedded", a hub id or a local directory.
    By default in `best_dtype()`; `options` go to `from_pretrained`. UserError if it fails."""
    quiet()
    hold_memory()
    release_memory()
    loaded, info = _load(transformers.AutoModelForCausalLM, model, dtype=dtype or best_dtype(),
                         output_loading_info=True, **options)
    require(not getattr(loaded, "_hf_peft_config_loaded", False),  # as transformers does by itself
            f"{model} is an adapter on the hub: download it, or name its base as the model")
    it = loaded.config
    ahead = it.model_type in MASKED and not getattr(it, "is_decoder", getattr(it, "causal", False))
    require(not ahead, f"{model} fills gaps in a text: name a causal language model")
    require(not info["missing_keys"], f"{model} lacks {[*info['missing_keys']][:2]}: save it again")
    own = {re.sub(r"\d+", "0", name) for name, m in loaded.named_modules() if m._parameters}
    spare = [key for key in info["unexpected_keys"]  # perhaps of layers that the config lacks
             if re.sub(r"\d+", "0", key.rpartition(".")[0]) in own]
    require(not spare, f"{model} has {spare[:2]}, which its config does not use: mend config.json")
    tokenizer = load_tokenizer(model)
    require_rows(loaded, tokenizer)
    it = loaded.generation_config  # values for sampling are saved only with `do_sample`
    it.do_sample = bool(it.do_sample or {it.temperature, it.top_p, it.top_k} - {None, 1}) or None
    loaded.config.pad_token_id = it.pad_token_id = tokenizer.pad_token_id
    return loaded.eval()


def context(model: PreTrainedModel) -> float:
    """The most tokens that a model reads; infinite where its config has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def require_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError unless the embedding has a row for each id of the tokenizer."""
    rows, last = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
    require(last < rows, f"the tokenizer in {tokenizer.name_or_path} has the id {last}, and the "
            f"embedding {rows} rows: resize the embedding, or use the tokenizer of its model")


def _load(loader: Any, model: str, **options: object) -> Any:
    """`loader.from_pretrained`, but say in one line why a model does not load."""
    source = locate(model)
    whole = loader is transformers.AutoTokenizer and has_tokenizer(source)
    require(whole or not Path(source, "adapter_config.json").is_file(), f"{source} is an adapter "
            f"of {adapter_base(source) or None}: name its base as the model")
    try:
        return loader.from_pretrained(source, **options)
    except Exception as error:
        path = Path(source)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        require(path.is_dir(), f"model {model!r} is not a local directory and did not load from "
                f"the hub ({reason}): check path, name and network, say where it is with "
                "--model, or use embedded; a server's address begins with http://")
        if (path / "manifest.json").is_file():
            verified(path)  # names the damaged file, if there is one
        raise UserError(f"{path} does not load ({reason}): check that it is a complete model, "
                        "that there is enough memory, and the pinned versions") from error


def has_tokenizer(source: str) -> bool:
    """Whether a folder has a tokenizer of its own; slow ones have no tokenizer.json."""
    return any(file for name in ("tokenizer.*", "vocab.*") for file in Path(source).glob(name))


def adapter_base(source: str) -> str:
    """The base that the folder of an adapter names; empty where none is named."""
    file = Path(source, "adapter_config.json")
    config = read_json(file) if file.is_file() else None
    return str((isinstance(config, dict) and config.get("base_model_name_or_path")) or "")


def quantized_config() -> BitsAndBytesConfig:
    """NF4 with double quantisation, computing in the machine's best dtype."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=best_dtype(),
        # FSDP shards floating-point tensors of one dtype only.
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
    """Keep 4-bit layers on a CPU dequantised in the block: it is slow to decode each few rows."""
    def forward(x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    layers = [m for m in model.modules() if hasattr(m, "compute_dtype")
              and hasattr(m.weight, "quant_state") and m.weight.device.type == "cpu"]
    for layer in layers:
        weight = frozen_weight(layer, layer.compute_dtype or torch.float32)
        bias = None if layer.bias is None else layer.bias.to(weight.dtype)
        layer.forward = functools.partial(forward, weight=weight, bias=bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
        release_memory()


def dequantized_base(model: str = "embedded") -> PreTrainedModel:
    """The NF4 base written out in float32: what a QLoRA adapter was trained on."""
    quantized = load_model(model, quantization_config=quantized_config())
    base = load_model(model, dtype=torch.float32)
    for name, module in quantized.named_modules():
        if type(module).__name__ == "Linear4bit":
            base.get_submodule(name).weight.data = frozen_weight(module, torch.float32)
    return base


def pad_right(pairs: Sequence[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and labels (batch, length), padded on the right."""
    ids, labels = ([*map(torch.tensor, rows)] for rows in zip(*pairs, strict=True))
    return pad_sequence(ids, True, pad), pad_sequence(labels, True, IGNORED)


def _call_glibc(function: str, *numbers: int) -> None:
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another C library
        getattr(ctypes.CDLL(None), function)(*numbers)


def hold_memory(largest: int = 1 << 30) -> None:
    """Let glibc keep freed blocks of up to `largest` bytes: mapping is up to a third of a step."""
    _call_glibc("mallopt", -3, largest)  # M_MMAP_THRESHOLD
    _call_glibc("mallopt", -1, 1 << 30)  # M_TRIM_THRESHOLD


def release_memory() -> None:
    """Return the memory of deleted models, which glibc would keep, to the operating system."""
    gc.collect()
    _call_glibc("malloc_trim", 0)


@functools.cache
def best_dtype() -> torch.dtype:
    """bfloat16 if a short matrix product is faster in it than in float32: we time both.
    Without bfloat16 instructions it takes up to 40 times as long. `COURSE_DTYPE` overrides."""
    if name := os.environ.get("COURSE_DTYPE"):
        require(name in ("float32", "bfloat16"), f"COURSE_DTYPE={name}: use float32 or bfloat16")
        return getattr(torch, name)
    if torch.cuda.is_available():
        return torch.bfloat16
    return min(seconds := product_seconds(), key=seconds.__getitem__)


def product_seconds() -> dict[torch.dtype, float]:
    """Time of a short matrix product in float32 and in bfloat16."""
    seconds = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    # Alternate and take the minimum, because other programs disturb single timings.
    end = time.perf_counter() + 0.5  # one product may take a quarter of that
    for dtype in [*seconds] * 15:
        left, right = torch.ones(512, 576, dtype=dtype), torch.ones(576, 576, dtype=dtype)
        if (start := time.perf_counter()) < end or math.inf in seconds.values():
            left @ right
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds


def machine() -> dict[str, object]:
    """What a result depends on: processor, cores, threads, dtype."""
    return {"system": platform.system(), "machine": platform.machine(), "cores": cores(),
            "threads": torch.get_num_threads(), "dtype": str(best_dtype()).removeprefix("torch.")}
