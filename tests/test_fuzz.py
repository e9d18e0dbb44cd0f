"""Readers of files given random and mutated bytes: a UserError or a valid result, nothing else."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import saved_adapter
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from lib.artifacts import read_json, verified, writing
from lib.base_model import tiny_model
from lib.bundle import open_bundle
from lib.configuration import Configuration, Layers, Level
from lib.course import read_notebook
from lib.errors import UserError
from lib.gguf import save_model
from lib.lora import adapter_factors, load_adapter
from lib.packing import load_packed, save_packed
from lib.records import KEYS, read_jsonl
from lib.search import Journal
from lib.switchable import Switchable

pytestmark = pytest.mark.usefixtures("float32")
DEEP = b"[" * 100_000
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["files", "layers", "bits", "r", "lora_alpha", "target_modules", "key",
                         "levels", "loss", "instruction", "response", "", "x"]), inner,
        max_size=4), max_leaves=8)
# Any bytes, any JSON, or places in a good file where something is put, taken or changed.
EDITS = st.lists(st.tuples(st.integers(0, 2**32), st.integers(0, 3), st.binary(max_size=9)),
                 min_size=1, max_size=4)
NOISE = st.binary(max_size=200) | JSON.map(lambda v: json.dumps(v).encode()) | EDITS


def mutated(good: bytes, noise: bytes | list[tuple[int, int, bytes]]) -> bytes:
    """The noise itself, or the good bytes with its edits."""
    if isinstance(noise, bytes):
        return noise
    for at, taken, put in noise:
        at %= len(good) + 1
        good = good[:at] + put + good[at + taken:]
    return good


def read(reader: Callable[..., Any], *arguments: Any) -> Any:
    """What a reader gives, None where it says in one line what is wrong."""
    try:
        return reader(*arguments)
    except UserError as error:
        assert "\n" not in str(error) and ":" in str(error), error
        return None


LINES = b"".join(b'{"instruction": "Unit %d?", "response": "It is caf\xc3\xa9 %d."}\n' % (i, i)
                 for i in range(3))


@given(NOISE)
@example(DEEP)
@example(b'{"instruction": "a", "response": "b", "x": ' + b"9" * 5000 + b"}")
def test_records(tmp_path: Path, noise: Any) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(mutated(LINES, noise))
    for record in read(read_jsonl, file) or []:
        assert all(record[key].strip() for key in KEYS)
        json.dumps(record, ensure_ascii=False).encode()


@pytest.fixture(scope="module")
def layers() -> Layers:
    return Layers.of(tiny_model(vocabulary=64))


@given(NOISE)
@example(DEEP)
@example(b'{"layers": {"model.layers.0.self_attn.q_proj": [[], 1, 2, 3, 4]}}')
def test_a_configuration(tmp_path: Path, layers: Layers, noise: Any) -> None:
    file = tmp_path / "plan.json"
    good = json.dumps(Configuration.uniform(layers, Level()).to_json()).encode()
    file.write_bytes(mutated(good, noise))
    plan = read(Configuration.load, file, layers)
    assert plan is None or (plan.layers == layers and plan.bytes > 0)


@given(JSON, st.integers(0, 13))
def test_a_configuration_with_one_strange_value(layers: Layers, value: Any, at: int) -> None:
    data = Configuration.uniform(layers, Level()).to_json()
    data["layers"][layers.names[at]] = value
    assert read(Configuration.from_json, data, layers) is None
    data["layers"][layers.names[at]] = [4, 8, value, 64, 256]
    assert read(Configuration.from_json, data, layers) is None


@given(NOISE)
@example(DEEP)
@example(b'{"files": {"%s": "0"}}' % (b"x" * 5000))
@example(b'{"files": {"../../../../../../dev/zero": "0"}}')
@example(b'{"files": {"a\\u0000b": "0"}}')
@example(b'{"files": {"\\ud800": 1}}')
@example(b'{"files": {".": "0", "weights": null}}')
def test_a_manifest(tmp_path: Path, noise: Any) -> None:
    target = tmp_path / "out"
    if not target.exists():
        with writing(target) as part:
            (part / "weights").write_bytes(b"weights")
        shutil.copy(target / "manifest.json", tmp_path / "good")
    (target / "manifest.json").write_bytes(mutated((tmp_path / "good").read_bytes(), noise))
    found = read(verified, target)
    # Whatever it says beside: what it lists is there and as it says.
    assert found is None or found["files"].keys() == {"weights"} or not found["files"].keys() - {
        "weights", "./weights"}


@given(NOISE)
@example(DEEP + b"\n")
@example(b'{"key": "a"}\n{"levels": 3, "loss": 1}\n')
@example(b'{"key": "a"}\n{"levels": [[]], "loss": 1}\n')
@example(b'{"key": "a"}\n[1]\n')
@example(b'3\n')
def test_a_journal(tmp_path: Path, noise: Any) -> None:
    file = tmp_path / "log.jsonl"
    good = b'{"key": "a"}\n{"bits": 3.1, "loss": 0.5, "levels": [1, 2]}\n{"bits": 2, "lo'
    content = mutated(good, noise)
    file.write_bytes(content)
    journal = read(Journal, file, "a")
    if journal is None:
        assert file.read_bytes() == content  # it may be something else's
    else:
        assert Journal(file, "a").known == journal.known


@given(NOISE)
@example(DEEP)
@example(b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": 3}')
@settings(max_examples=20)
def test_a_notebook(tmp_path: Path, noise: Any) -> None:
    file = tmp_path / "01_one.ipynb"
    file.write_bytes(mutated(
        b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": []}', noise))
    read(read_notebook, file)


def headed(header: bytes, rest: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + rest


def parts(file: Path) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    return content[8:8 + size], content[8 + size:]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, float32: None) -> tuple[LlamaForCausalLM, Path]:
    """A model that is quickly made, and its packed, exported and adapted files."""
    root, model = tmp_path_factory.mktemp("small"), tiny_model(layers=1, vocabulary=64)
    base = Switchable(model)
    save_packed(base, Configuration.uniform(base.layers, Level()), root / "packed.safetensors")
    saved_adapter(model, root / "adapter")
    return model, root


@given(NOISE, st.booleans())
@example(b"", True)
@example(b"\xff" * 8, False)
@example(b'{"__metadata__": {"packed": "%s"}}' % DEEP, True)
@example(b'{"__metadata__": {"packed": "[]"}}', True)
@example(rb'{"__metadata__": {"packed": "{\"grid\": \"nf\", \"configuration\": []}"}}', True)
def test_a_packed_file(small: tuple[LlamaForCausalLM, Path], tmp_path: Path, noise: Any,
                       inside: bool) -> None:
    model, root = small
    header, rest = parts(root / "packed.safetensors")
    file = tmp_path / "packed.safetensors"
    # Mutated inside the header, whose length then is right, or anywhere.
    file.write_bytes(headed(mutated(header, noise), rest) if inside
                     else mutated(headed(header, rest), noise))
    plan = read(load_packed, tiny_model(layers=1, vocabulary=64), file)
    assert plan is None or plan.layers == Layers.of(model)


@given(JSON, st.sampled_from(["dtype", "shape", "data_offsets"]), st.integers(0, 6))
@example("F32", "dtype", 0)
@example("F8_E4M3", "dtype", 1)
@example([2**62, 2**62], "shape", 2)
def test_a_header_with_one_strange_value(small: tuple[LlamaForCausalLM, Path], tmp_path: Path,
                                         value: Any, key: str, at: int) -> None:
    _, root = small
    for name, reader in (("packed.safetensors",
                          lambda f: load_packed(tiny_model(layers=1, vocabulary=64), f)),
                         ("adapter/adapter_model.safetensors", adapted)):
        header, rest = parts(root / name)
        entries = json.loads(header)
        entries[sorted(entries)[1:][at % (len(entries) - 1)]][key] = value
        file = tmp_path / Path(name).name
        file.write_bytes(headed(json.dumps(entries).encode(), rest))
        if name.startswith("adapter"):
            shutil.copy(root / "adapter" / "adapter_config.json", tmp_path)
        read(reader, file)


def adapted(file: Path) -> None:
    """Both readers of an adapter, on files whose manifest fits them."""
    folder = file.parent
    read(adapter_factors, folder)
    with writing(folder / "whole") as part:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(folder / name, part)
    model = read(load_adapter, tiny_model(layers=1, vocabulary=64), folder / "whole")
    if model is not None:
        kept = load_file(folder / "adapter_model.safetensors")
        assert {k for k in model.state_dict() if "lora_" in k} == {
            k.replace(".weight", ".default.weight") for k in kept}


@given(NOISE)
@example(DEEP)
def test_an_adapters_configuration(small: tuple[LlamaForCausalLM, Path], tmp_path: Path,
                                   noise: Any) -> None:
    source = small[1] / "adapter"
    shutil.copy(source / "adapter_model.safetensors", tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(
        mutated((source / "adapter_config.json").read_bytes(), noise))
    adapted(tmp_path / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def keys(small: tuple[LlamaForCausalLM, Path]) -> list[str]:
    return sorted(read_json(small[1] / "adapter" / "adapter_config.json"))


@given(st.integers(0, 200), JSON)
@settings(max_examples=100)
def test_an_adapters_configuration_with_one_strange_value(
        small: tuple[LlamaForCausalLM, Path], keys: list[str], tmp_path: Path, at: int,
        value: Any) -> None:
    source = small[1] / "adapter"
    shutil.copy(source / "adapter_model.safetensors", tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(
        read_json(source / "adapter_config.json") | {keys[at % len(keys)]: value}))
    adapted(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("value", [10**9, -1, True, 4.0, "4", None, [4]])
def test_a_strange_rank_takes_no_memory(small: tuple[LlamaForCausalLM, Path], tmp_path: Path,
                                        value: Any) -> None:
    shutil.copytree(small[1] / "adapter", tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(read_json(config) | {"r": value}))
    with pytest.raises(UserError, match="does not go with"):
        adapter_factors(tmp_path / "a")


@pytest.fixture(scope="module")
def served(small: tuple[LlamaForCausalLM, Path]) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.gguf._add_tokenizer", lambda *_: None)
        save_model(small[0], small[1] / "model.gguf", kind="F32")
    return (small[1] / "model.gguf").read_bytes()


@given(NOISE)
def test_a_served_file(served: bytes, tmp_path: Path, noise: Any) -> None:
    file = tmp_path / "model.gguf"
    # The beginning is where everything is told.
    file.write_bytes(mutated(served[:2000], noise) + served[2000:])
    bundle = read(open_bundle, file)
    assert bundle is None or bundle.model == file


@given(JSON, st.sampled_from(["model", "name", "adapters"]))
@example([], "adapters")
@example({"x": 3}, "adapters")
@example("../model.gguf", "model")
def test_a_served_folders_manifest(served: bytes, small: tuple[LlamaForCausalLM, Path],
                                   tmp_path: Path, value: Any, key: str) -> None:
    facts: dict[str, Any] = {"model": "model.gguf", "name": "base", "adapters": {}}
    with writing(tmp_path / "edge", **(facts | {key: value})) as part:
        (part / "model.gguf").write_bytes(served)
    read(open_bundle, tmp_path / "edge")
