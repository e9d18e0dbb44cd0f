"""lib on every system: names of one system stand behind a guard. Ruff checks encodings."""

from pathlib import Path

import pytest
from conftest import ROOT

from lib.errors import UserError
from lib.quantize.gguf import export


def test_git_leaves_line_ends_alone() -> None:
    """A checkout under Windows would otherwise break the hashes of the shipped adapters."""
    lines = (ROOT / ".gitattributes").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["* -text"]
    for file in (ROOT / "data" / "adapters").rglob("*.json"):
        assert b"\r" not in file.read_bytes(), file


@pytest.mark.parametrize("name", ["a:b", "a/b", "..", "../x", ".x", "model", "base", "a b", ""])
def test_an_adapters_name_is_a_file_name_everywhere(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter name"):
        export(tmp_path / "out", adapters={name: tmp_path / "adapter"})
    assert list(tmp_path.iterdir()) == []
