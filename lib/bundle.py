"""What a server holds, checked before it starts: a GGUF model, adapters that fit it.

Nothing here needs torch, so that a server stays small.
"""

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lib.artifacts import verified
from lib.errors import UserError, require
from lib.scratch import there

BASE_KEY = "general.base_model.0.name"
# What the reader raises for bytes that make no sense.
DAMAGE = (ValueError, LookupError, OverflowError, TypeError, AttributeError, struct.error, OSError)


@dataclass(frozen=True)
class Bundle:
    """What one server holds: a model, and adapters by name with default scales."""

    name: str
    model: Path
    adapters: dict[str, tuple[Path, float]]
    context: int


def open_bundle(path: Path, loras: Sequence[str] = ()) -> Bundle:
    """Model and adapters of a directory that `python -m lib export` wrote, or of files.

    Args:
        path: such a directory, or a GGUF file.
        loras: further adapters, each "NAME=FILE" or "NAME=FILE:SCALE".

    Raises:
        UserError: missing, damaged or foreign file; an adapter that does not fit.
    """
    require(there(path), f"{path} does not exist: check the path")
    model, name, adapters = path, path.stem, {}
    if path.is_dir():
        facts = verified(path)
        require("adapters" in facts, f"{path} is not from `python -m lib export`: make one")
        try:
            model, name = path / facts["model"], str(facts["name"])
            adapters = {n: (path / file, 0.0) for n, file in facts["adapters"].items()}
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path / 'manifest.json'} is damaged: export it again") from None
    for text in loras:
        match = re.fullmatch(r"([\w.-]+)=(.+?)(?::(-?(?:\d+\.?\d*|\.\d+)))?", text)
        require(match, f"--lora {text!r} is not NAME=FILE or NAME=FILE:SCALE")
        adapters[match[1]] = (Path(match[2]), float(match[3] or 0))
    require(name not in adapters, f"adapter {name!r} has the model's name: rename it")
    try:
        reader = opened(model, {n: file for n, (file, _) in adapters.items()})
        return Bundle(name, model, adapters, int(fact(reader, "llama.context_length")))
    except DAMAGE as error:  # in what is read later than the header
        raise UserError(f"{model} is no whole GGUF file ({error}): make it again") from None


class Reader(gguf.GGUFReader):
    """gguf's reader with lists read at once.

    Its own makes NumPy objects for each entry, seconds for a vocabulary.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[Any, ...]:
        if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        view, at = memoryview(self.data), orig_offs + 12
        number, count = struct.unpack_from("=IQ", view, orig_offs)
        kind = gguf.GGUFValueType(number)
        if kind != gguf.GGUFValueType.STRING:
            values = np.frombuffer(view, self.gguf_scalar_to_np[kind], count, at)
            return 12 + values.nbytes, [values], [0], [gguf.GGUFValueType.ARRAY, kind]
        texts = []
        for _ in range(count):
            (size,) = struct.unpack_from("=Q", view, at)
            texts.append(view[at + 8: at + 8 + size])
            at += 8 + size
        return at - orig_offs, texts, list(range(count)), [gguf.GGUFValueType.ARRAY, kind]


def opened(model: Path, adapters: Mapping[str, Path]) -> Reader:
    """The model's reader, when it and the adapters are whole and fit together.

    Raises:
        UserError: a missing, damaged or foreign file, an adapter for another
            base or with other shapes.
    """
    reader = _read(model)
    require(fact(reader, "general.type") != "adapter",
            f"{model} is an adapter: name a model, and the adapter with --lora NAME=FILE")
    for name, file in adapters.items():
        _check_adapter(reader, _read(file), name)
    return reader


def fact(reader: Reader, key: str) -> Any:
    """Value of a metadata key, None where there is none."""
    field = reader.fields.get(key)
    return field.contents() if field else None


def _read(path: Path) -> Reader:
    require(there(path) and path.is_file(), f"{path} does not exist: check the path")
    try:
        reader = Reader(path)
        architecture = fact(reader, "general.architecture")
    except DAMAGE as error:
        raise UserError(f"{path} is no whole GGUF file ({error}): make it again") from None
    require(architecture == "llama",
            f"{path} holds a {architecture} model: only llama is served here")
    return reader


def _check_adapter(model: Reader, adapter: Reader, name: str) -> None:
    require(fact(adapter, "adapter.type") == "lora",
            f"adapter {name} is no LoRA file: export it with `python -m lib export`")
    wanted, given = fact(adapter, BASE_KEY), fact(model, BASE_KEY)
    require(wanted == given or None in (wanted, given),
            f"adapter {name} was made for {wanted!r}, the model is {given!r}: "
            "export both from the same base")
    weights = {t.name: tuple(map(int, t.shape)) for t in model.tensors}
    factors = {t.name: tuple(map(int, t.shape)) for t in adapter.tensors}
    for target in {key.rpartition(".")[0] for key in factors}:
        a, b = (factors.get(f"{target}.lora_{x}", (0, 0)) for x in "ab")
        require(a[1] == b[0] and weights.get(target) == (a[0], b[1]),
                f"adapter {name} does not fit the model at {target}: A takes {a[0]} to "
                f"rank {a[1]}, B rank {b[0]} to {b[1]}, the weight is {weights.get(target)}")
