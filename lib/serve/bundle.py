"""What a server holds, checked before it starts: a GGUF model and adapters that fit it."""

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType as Kind

from lib.errors import UserError, require
from lib.files import MANIFEST, verified

BASE_KEY = "general.base_model.0.name"
# What gguf's reader raises for damaged bytes.
DAMAGE = (ValueError, LookupError, OverflowError, TypeError, AttributeError, struct.error, OSError)


@dataclass(frozen=True)
class Bundle:
    """A model, and adapters by name: (file, default scale)."""

    name: str
    model: Path
    adapters: dict[str, tuple[Path, float]]
    context: int  # tokens of prompt and answer, in the engine's steps of 256
    vocabulary: int  # tokens
    template: str


def open_bundle(path: Path, loras: Sequence[str] = ()) -> Bundle:
    """An export's folder or a GGUF file, and adapters NAME=FILE[:SCALE]; UserError if damaged."""
    require(path.exists(), f"{path} does not exist: check the path")
    try:
        model, name, adapters = path, path.stem, {}
        if path.is_dir():
            manifest = verified(path)
            require("adapters" in manifest, f"{path} has no GGUF model: make one with `export`")
            model, name = path / manifest["model"], str(manifest["name"])
            adapters = {n: (path / file, 0.0) for n, file in manifest["adapters"].items()}
        for text in loras:
            match = re.fullmatch(r"([\w.-]+)=(.+?)(?::(-?(?:\d+\.?\d*|\.\d+)))?", text)
            require(match and match[1] not in adapters, f"--lora {text!r}: use NAME=FILE or "
                    "NAME=FILE:SCALE, and each name once")
            adapters[match[1]] = (Path(match[2]), float(match[3] or 0))
        require(name not in adapters, f"adapter {name!r} has the model's name: rename it")
        reader = model_reader(model, {n: file for n, (file, _) in adapters.items()})
        architecture, tokens = metadata(reader, "general.architecture"), "tokenizer.ggml.tokens"
        context = metadata(reader, f"{architecture}.context_length")
        require(context and not metadata(reader, f"{architecture}.pooling_type"), f"{model} is not "
                "a language model, or not the first file of one: name another")
        return Bundle(
            name, model, adapters, max(256, context // 256 * 256), len(reader.fields[tokens].data),
            str(metadata(reader, "tokenizer.chat_template") or ""))
    except DAMAGE as error:  # a manifest that was edited, or what is read after a header
        raise UserError(f"{path} is damaged ({error}): export it again") from None


def open_bundles(path: Path, loras: Sequence[str] = ()) -> list[Bundle]:
    """The bundle of an export, or of each budget that `deploy` wrote, named NAME@BUDGET."""
    manifest = verified(path) if (path / MANIFEST).is_file() else {}
    if "deployments" not in manifest:
        return [open_bundle(path, loras)]
    require(not loras, f"{path} has several models: name one of its folders for --lora")
    bundles = {name: open_bundle(path / name) for name in manifest["deployments"]}
    return [replace(bundle, name=f"{bundle.name}@{name}") for name, bundle in bundles.items()]


class Reader(gguf.GGUFReader):
    """gguf's reader, twenty times as fast; UserError for damage."""

    def __init__(self, path: Path) -> None:
        require(path.is_file(), f"{path} does not exist, or is a folder: check the path")
        try:
            super().__init__(path)
        except DAMAGE as error:
            raise UserError(f"{path} is not a whole GGUF file ({error}): make it again") from None

    def _get_field_parts(self, at: int, kind: int) -> tuple[int, list[Any], list[int], list[Any]]:
        # gguf makes several calls for each item of a vocabulary, and slices a map, which is slow.
        if kind != Kind.ARRAY or (item := self._get(at, np.uint32)[0]) == Kind.ARRAY:
            return super()._get_field_parts(at, kind)
        (count,), end, raw, parts = self._get(at + 4, np.uint64), at + 12, np.asarray(self.data), []
        if scalar := self.gguf_scalar_to_np.get(Kind(item)):
            parts, count = [self._get(end, scalar, count)], 0
            end += parts[0].nbytes
        for _ in range(count):
            (size,) = struct.unpack_from("<Q", raw, end)
            parts.append(raw[end + 8:end + 8 + size])
            end += 8 + size
        return end - at, parts, [*range(len(parts))], [Kind.ARRAY, Kind(item)]


def model_reader(model: Path, adapters: Mapping[str, Path]) -> Reader:
    """Reader of a model whose file is whole and whose adapters fit; UserError otherwise."""
    reader = Reader(model)
    require(metadata(reader, "general.type") != "adapter",
            f"{model} is an adapter: name a model, and the adapter with --lora NAME=FILE")
    # A model names itself, and the base of an adapter made elsewhere may be that name.
    base, name = metadata(reader, BASE_KEY), metadata(reader, "general.name")
    for adapter, file in adapters.items():  # the engine checks the rest
        adapter_base = metadata(Reader(file), BASE_KEY)
        require(adapter_base in (base, name, None) or base is None,
                f"{adapter} was made for {adapter_base!r}, not {base!r}: export both from one base")
    return reader


def metadata(reader: gguf.GGUFReader, key: str) -> Any:
    """Value of a metadata key, None where there is none."""
    return reader.fields[key].contents() if key in reader.fields else None
