"""Files from outside given random and mutated bytes: a UserError or a valid result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.evidence.tiny import tiny_model
from lib.base.records import read_jsonl
from lib.errors import UserError
from lib.quantize.gguf import write_model
from lib.serve.bundle import open_bundle

# Any bytes, or places in a good file where something is added, removed or changed.
EDITS = st.lists(st.tuples(st.integers(0, 2**32), st.integers(0, 3), st.binary(max_size=9)),
                 min_size=1, max_size=4)
NOISE = st.binary(max_size=200) | EDITS


def mutated(good: bytes, noise: bytes | list[tuple[int, int, bytes]]) -> bytes:
    """The noise itself, or the good bytes with its edits."""
    if isinstance(noise, bytes):
        return noise
    for at, removed, added in noise:
        at %= len(good) + 1
        good = good[:at] + added + good[at + removed:]
    return good


def read(reader: Callable[..., Any], *arguments: Any) -> Any:
    """What a reader returns; None where it says in one line what is wrong."""
    try:
        return reader(*arguments)
    except UserError as error:
        assert "\n" not in str(error) and ":" in str(error), error
        return None


LINES = b"".join(b'{"instruction": "Unit %d?", "response": "It is caf\xc3\xa9 %d."}\n' % (i, i)
                 for i in range(3))


@given(NOISE)
@example(b"[" * 100_000)
@example(b'{"instruction": "\\ud800", "response": "b"}\n')
def test_records(tmp_path: Path, noise: Any) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(mutated(LINES, noise))
    for record in read(read_jsonl, file) or []:
        assert record["instruction"].strip() and record["response"].strip()
        json.dumps(record, ensure_ascii=False).encode()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("served") / "model.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.quantize.gguf._tokenizer", list)
        write_model(tiny_model(layers=1, vocabulary=64), file, gguf_type="F32")
    return file.read_bytes()


@given(NOISE)
def test_a_served_file(served: bytes, tmp_path: Path, noise: Any) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(mutated(served[:2000], noise) + served[2000:])  # the header is there
    bundle = read(open_bundle, file)
    assert bundle is None or bundle.model == file
