"""Running notebooks: executed copies, pages, stored outputs, errors in one line."""

import base64
import io
import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from PIL import Image

from data.evidence import notebooks as stored
from data.evidence import site
from lib.course import notebook as opening
from lib.course import run as course
from lib.errors import UserError
from lib.evaluate.scores import COLOURS

FAST = "import os\nPROFILE = os.environ.get('COURSE_PROFILE', 'laptop')"
SAVE = ("import json, pathlib; pathlib.Path('../build/course/smoke/01.json').write_text("
        "json.dumps({'measured': [{'name': 'score', 'value': 0.75, 'unit': 'share'}]}))")
PAGE = "# Page\n\n<!-- costs -->\nold\n<!-- end of costs -->\n<!-- plan -->\n<!-- end of plan -->\n"


def write(path: Path, *sources: str) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    text = nbformat.v4.new_markdown_cell("# One\n\n**Takes** so much\nand more.\n\nThe end.")
    nbformat.write(nbformat.v4.new_notebook(cells=[text, *cells], metadata={"kernelspec": {
        "name": "python3", "display_name": "Python 3", "language": "python"}}), path)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    books, build = tmp_path / "notebooks", tmp_path / "build"
    books.mkdir()
    monkeypatch.setattr(course, "NOTEBOOKS", books)
    monkeypatch.setattr(opening, "BUILD", build)
    monkeypatch.setenv("COURSE_PROFILE", "smoke")
    monkeypatch.setattr(site, "build_site", lambda *_, **__: None)
    return books, build / "course" / "smoke"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_sees_the_sections(folders: tuple[Path, Path], terminal: bool,
                                      monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    books, _ = folders
    write(books / "01_one.ipynb", FAST)
    book = nbformat.read(books / "01_one.ipynb", 4)
    book.cells.append(nbformat.v4.new_markdown_cell("## 1. Why a low rank\n\nBecause.\n\n### No"))
    nbformat.write(book, books / "01_one.ipynb")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    course.run("smoke")
    said = capsys.readouterr().err
    assert said.count("      1. Why a low rank\n") == terminal and "Because" not in said


def test_a_run_and_what_it_stores(folders: tuple[Path, Path]) -> None:
    books, out = folders
    write(books / "01_one.ipynb", FAST, "print('profile is', PROFILE)\nblock = b'x' * 300_000_000",
          "import time; time.sleep(1.5)", SAVE)
    write(books / "02_two.ipynb", FAST, "6 * 7",
          "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()")
    (books / "02_two-Copy1.ipynb").write_text("a reader's copy is not of the course")
    for name in ("START", "INSTRUCTORS"):
        (books / f"{name}.md").write_text(PAGE)
    out.mkdir(parents=True)
    assert course.run("smoke", store=True) == out / "site"
    one, two = (nbformat.read(books / f"{name}.ipynb", 4) for name in ("01_one", "02_two"))
    assert one.metadata.course.peak_mb > 300 and one.metadata.course.cell_seconds[2] >= 1.5
    assert one.cells[0].source == f"# One\n\n{stored.takes(one.metadata.course)}\n\nThe end."
    assert two.cells[2].outputs[0].data["text/plain"] == "42" and len(two.cells) == 4
    # Vectors are for the pages and decks of a run.
    assert "image/png" in two.cells[3].outputs[0].data
    assert "image/svg+xml" not in two.cells[3].outputs[0].data
    assert stored.with_outputs_of(out / "02_two.ipynb", two)
    assert "image/svg+xml" in two.cells[3].outputs[0].data
    assert two.metadata.course.source_sha256 == stored.source_hash(two)
    assert "papermill" not in two.metadata
    assert "| all six | " in (books / "START.md").read_text()
    # Its minutes are those of reading; the seconds are this machine's.
    assert re.search(r"\| 01 \| Opening \| 1 \| \d+ \|", (books / "INSTRUCTORS.md").read_text())
    two.cells[2].source = "6 * 8"
    assert two.metadata.course.source_sha256 != stored.source_hash(two)
    assert not stored.with_outputs_of(out / "02_two.ipynb", two)


def test_only_one(folders: tuple[Path, Path]) -> None:
    books, out = folders
    write(books / "01_one.ipynb", FAST)
    write(books / "05_five.ipynb", FAST)
    course.run("smoke", only="5")
    assert (out / "05_five.ipynb").is_file() and not (out / "01_one.ipynb").exists()


@pytest.mark.parametrize(("cell", "message"), [
    ("raise ValueError('no such sensor')", r"03_x.ipynb, cell \d+: ValueError: no such sensor"),
    ("import os; os._exit(1)", "03_x.ipynb: its kernel died.*--only 03")])
def test_a_cell_that_fails_is_one_line(folders: tuple[Path, Path], cell: str,
                                       message: str) -> None:
    books, out = folders
    write(books / "03_x.ipynb", FAST, cell)
    with pytest.raises(UserError, match=message):
        course.run("smoke")
    assert not (out / "03_x.ipynb").exists()


def test_a_damaged_notebook_is_one_line(folders: tuple[Path, Path]) -> None:
    books, _ = folders
    (books / "03_x.ipynb").write_text('{"cells": [', encoding="utf-8")
    with pytest.raises(UserError, match=r"03_x.ipynb is not readable JSON"):
        course.run("smoke")


def test_tables_need_their_marks(tmp_path: Path) -> None:
    (tmp_path / "START.md").write_text("without marks")
    with pytest.raises(UserError, match="lacks the marks"):
        stored.put_table(tmp_path / "START.md", "costs", "x")


def test_the_plan_counts_words_code_exercises_and_measured_cells() -> None:
    new = nbformat.v4
    tags = {"tags": ["exercise"]}
    notebook = new.new_notebook(metadata={"course": {"cell_seconds": [600.0, 2.0]}}, cells=[
        new.new_markdown_cell("## S\n\n" + "word " * 218), new.new_code_cell("a"),
        new.new_markdown_cell("### Exercise 1 (core): do", metadata=tags),
        new.new_code_cell("stub", metadata=tags), new.new_markdown_cell("after it")])
    rows = stored.plan(notebook)
    assert [*rows] == ["S", "Exercise 1 (core): do"]
    assert rows["S"] == [pytest.approx(2, abs=0.1), 600]
    assert rows["Exercise 1 (core): do"] == [pytest.approx(10, abs=0.1), 2]


def test_start_opens_a_notebook(folders: tuple[Path, Path],
                                capsys: pytest.CaptureFixture[str]) -> None:
    with plt.rc_context():
        profile, seen = opening.start("01", "smoke", "other")
        first = np.random.random()
        lines = capsys.readouterr().out.splitlines()
        opening.start("01", "smoke", "other")
    assert np.random.random() == first
    assert lines[0].startswith("profile: smoke | model: other | dtype: ") and len(lines) <= 3
    assert "torch 2." in lines[1] and max(map(len, lines)) < 80
    seen.add("score", 0.5, "share")
    seen.add("score", 0.75, "share")
    seen.add("time", 3, "s")
    figures = json.loads((folders[1] / "01.json").read_text())
    assert [(r["name"], r["value"]) for r in figures["measured"]] == [("score", 0.75), ("time", 3)]
    assert figures["versions"]["torch"] and figures["profile"]["name"] == profile.name == "smoke"


def test_stored_figures_have_few_colours_and_look_the_same() -> None:
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=80)
    for up, colour in enumerate(COLOURS):
        axes.plot(range(50), [up + x ** 0.5 for x in range(50)], color=colour)
    axes.imshow(np.random.default_rng(0).random((7, 30)), extent=(0, 20, 0, 4), aspect="auto")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    plain = base64.b64encode(file.getvalue()).decode()
    less = stored.smaller(plain)
    assert len(less) < 0.8 * len(plain) and len(stored.smaller(less)) <= len(less)
    before, after = (np.asarray(Image.open(io.BytesIO(base64.b64decode(p))).convert("RGB"),
                                dtype=float) for p in (plain, less))
    assert before.shape == after.shape and abs(before - after).mean() < 2
    for colour in COLOURS:  # the palette tells things apart
        own = (before == [int(colour[i:i + 2], 16) for i in (1, 3, 5)]).all(-1)
        assert abs(before[own] - after[own]).max(initial=0) <= 8
