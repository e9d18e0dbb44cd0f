"""Spelling, and one word for one thing, in everything that people read."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from lib.files import ROOT

# {what is not written: what is}; code, in backquotes or blocks, may have it.
WORDS = {
    r"anew": "again", r"whatever": "say what", r"no more (used|needed)": "no longer",
    r"(de)?quanti[z]\w+": "quantised", r"behavior\w*": "behaviour", r"colors?": "colour",
    r"normaliz\w+": "normalised", r"memoriz\w+": "memorised", r"initializ\w+": "initialised",
    r"data sheets?": "datasheet", r"datasets?": "data set", r"finetun\w+": "fine-tuning",
    r"hyperparameters?": "hyper-parameter", r"time-?steps?": "step", r"bit-plans?": "configuration"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.md")),
         *sorted((ROOT / "data").rglob("*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]


def prose(path: Path) -> str:
    """The text of a page, or of a notebook's Markdown and slides."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
    return "\n\n".join(cell.source + "\n" + cell.metadata.get("slide", "") for cell in cells)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_one_word_for_one_thing(path: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|<[^>]+>|https?://\S+", " ", prose(path),
                  flags=re.DOTALL)
    for wrong, right in WORDS.items():
        # Titles of papers have "Quantization".
        found = re.search(rf"\b{wrong}\b", text, 0 if "quanti" in wrong else re.IGNORECASE)
        assert not found, f"{found[0]!r} in {path.name}: write {right!r}"


def test_spelling(tmp_path: Path) -> None:
    for path in PAGES:
        (tmp_path / f"{path.parent.name}_{path.stem}.md").write_text(prose(path), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", str(tmp_path), "lib", "data/evidence", "tests",
         "--skip", "*.json,*.pyc", "--ignore-words-list", "caf"], cwd=ROOT,
        capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
