"""Running notebooks: executed copies, pages, kept outputs, errors in one line."""

import base64
import io
import json

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from PIL import Image

from lib import course, measure
from lib.course import smaller
from lib.errors import UserError
from lib.plots import COLOURS

FAST = "import os\nPROFILE = os.environ.get('COURSE_PROFILE', 'laptop')"


def write(path, *sources):
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {
        "name": "python3", "display_name": "Python 3", "language": "python"}})
    notebook.cells = [nbformat.v4.new_code_cell(s) for s in sources]
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    books, build = tmp_path / "notebooks", tmp_path / "build"
    books.mkdir()
    monkeypatch.setattr(course, "NOTEBOOKS", books)
    monkeypatch.setattr(measure, "BUILD", build)
    monkeypatch.setenv("COURSE_PROFILE", "smoke")
    return books, build / "course" / "smoke"


def test_run_leaves_copies_pages_and_index(folders):
    books, out = folders
    write(books / "01_one.ipynb", FAST, "print('profile is', PROFILE)")
    write(books / "02_two.ipynb", FAST, "print(6 * 7)")
    (books / "WORDS.md").write_text("linked")
    assert course.run("smoke", store=True) == out
    assert (out / "WORDS.md").read_text() == "linked"
    executed = nbformat.read(out / "01_one.ipynb", as_version=4)
    assert "profile is smoke" in executed.cells[-1].outputs[0].text
    index = (out / "index.html").read_text()
    assert "01_one.html" in index and "02_two.html" in index
    assert "42" in (out / "02_two.html").read_text()
    kept = nbformat.read(books / "02_two.ipynb", as_version=4)
    assert kept.cells[1].outputs[0].text == "42\n"
    assert kept.metadata.course.source_sha256 == course.source_hash(kept)
    assert "papermill" not in kept.metadata and len(kept.cells) == 2


def test_a_kernel_that_dies_or_hangs_is_one_line(folders, monkeypatch):
    books, out = folders
    write(books / "03_three.ipynb", FAST, "import os; os._exit(1)")
    with pytest.raises(UserError, match="03_three.ipynb: its kernel died.*--only 03"):
        course.run("smoke")
    write(books / "03_three.ipynb", FAST, "import time; time.sleep(60)")
    monkeypatch.setattr(course, "CELL_TIMEOUT", 1)
    with pytest.raises(UserError, match="a cell took over 1 s: use a smaller --profile"):
        course.run("smoke")
    assert not (out / "03_three.ipynb").exists()


def test_storing_brings_the_table_of_costs_up_to_date(folders):
    books, _ = folders
    write(books / "01_one.ipynb", FAST)
    start = books / "START.md"
    start.write_text("# Start\n\n<!-- costs -->\nold\n<!-- end of costs -->\nMore.\n")
    course.run("smoke")
    assert "old" in start.read_text()
    course.run("smoke", store=True)
    assert start.read_text() == (f"# Start\n\n<!-- costs -->\n{course.costs_table()}\n"
                                 "<!-- end of costs -->\nMore.\n")
    assert "| 01_one | 0." in start.read_text() and "| all six | " in start.read_text()
    start.write_text("# Start, without marks\n")
    with pytest.raises(UserError, match="lacks the marks"):
        course.keep_table(start)


def test_what_a_run_took_goes_into_figures_and_opening(folders):
    books, out = folders
    save = ("import json, pathlib; pathlib.Path('../build/course/smoke/01.json')"
            ".write_text(json.dumps({'measured': []}))")
    write(books / "01_one.ipynb", FAST,
          "import time; block = b'x' * 300_000_000; time.sleep(1.5)", save)
    notebook = nbformat.read(books / "01_one.ipynb", as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(
        "# One\n\n**Takes** so much\nand more.\n\nThe end."))
    nbformat.write(notebook, books / "01_one.ipynb")
    out.mkdir(parents=True)
    course.run("smoke", store=True)
    kept = nbformat.read(books / "01_one.ipynb", as_version=4)
    cost = json.loads((out / "01.json").read_text())["whole_run"]
    assert {k: kept.metadata.course[k] for k in cost} == cost
    assert cost["peak_mb"] > 300 and cost["seconds"] > 0
    assert kept.cells[0].source == (
        f"# One\n\n{course.takes(kept.metadata.course)}\n\nThe end.")
    assert course.takes({"seconds": 90, "peak_mb": 1960, "cores": 2, "dtype": "float32"}) == (
        "**Takes** 1.5 minutes and 2.0 GB of memory on 2 cores that compute in float32.")
    assert f"{cost['seconds']} s, peak" in (out / "index.html").read_text()


def test_only_one(folders):
    books, out = folders
    write(books / "01_one.ipynb", FAST)
    write(books / "05_five.ipynb", FAST)
    course.run("smoke", only="5")
    assert (out / "05_five.html").is_file() and not (out / "01_one.html").exists()


def test_a_failing_cell_is_one_line(folders):
    books, out = folders
    write(books / "01_one.ipynb", FAST, "raise ValueError('no such sensor')")
    with pytest.raises(UserError, match=r"01_one.ipynb, cell \d+: ValueError: no such sensor"):
        course.run("smoke")
    assert not (out / "01_one.ipynb").exists()


def test_a_changed_cell_is_noticed(folders):
    books, _ = folders
    write(books / "01_one.ipynb", FAST, "1 + 1")
    before = course.source_hash(nbformat.read(books / "01_one.ipynb", as_version=4))
    write(books / "01_one.ipynb", FAST, "1 + 2")
    assert before != course.source_hash(nbformat.read(books / "01_one.ipynb", as_version=4))


def test_measurements_are_kept_as_they_come(folders):
    from lib.artifacts import read_json
    from lib.profiles import get_profile

    _, out = folders
    seen = measure.Measurements("01", get_profile("smoke"))
    seen.add("score", 0.5, "share")
    seen.add("score", 0.75, "share")
    seen.add("time", 3, "s")
    stored = read_json(out / "01.json")
    assert [(r["name"], r["value"]) for r in stored["measured"]] == [("score", 0.75), ("time", 3)]
    assert stored["versions"]["torch"] and stored["profile"]["name"] == "smoke"
    assert "<td>0.75" in course._table(stored["measured"])


def test_stored_figures_have_few_colours_and_look_the_same() -> None:
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=80)
    for up, colour in enumerate(COLOURS):
        axes.plot(range(50), [up + x ** 0.5 for x in range(50)], color=colour)
    axes.imshow(np.random.default_rng(0).random((7, 30)), extent=(0, 20, 0, 4), aspect="auto")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    plain = base64.b64encode(file.getvalue()).decode()
    less = smaller(plain)
    assert len(less) < 0.8 * len(plain)
    before, after = (np.asarray(Image.open(io.BytesIO(base64.b64decode(p))).convert("RGB"),
                                dtype=float) for p in (plain, less))
    assert before.shape == after.shape and abs(before - after).mean() < 2
    # The palette tells things apart, so its colours stay as they are.
    for colour in COLOURS:
        own = (before == [int(colour[i:i + 2], 16) for i in (1, 3, 5)]).all(-1)
        assert abs(before[own] - after[own]).max(initial=0) <= 8
    assert len(smaller(less)) <= len(less)
