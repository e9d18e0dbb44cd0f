"""House style of the notebooks, and that stored outputs belong to the source."""

import importlib.util
import json
import re
import statistics
from pathlib import Path

import nbformat
import pytest

from lib.artifacts import ROOT
from lib.course import notebooks, source_hash, takes
from lib.profiles import PROFILES

ALL = notebooks()
TAGS = {"parameters", "exercise", "solution", "instructor", "slow"}
NAMES = ["01_lora_math", "02_qlora_training", "03_merge_int8", "04_edge_serving",
         "05_coa_lora_pareto", "06_evaluation"]
each = pytest.mark.parametrize("path", ALL, ids=[p.stem for p in ALL])


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(path: Path) -> list[nbformat.NotebookNode]:
    return [c for c in read(path).cells if c.cell_type == "code"]


def lines(cell: nbformat.NotebookNode) -> list[str]:
    return [x for x in cell.source.splitlines() if x.strip() and not x.strip().startswith("#")]


def test_the_six_are_there_in_order():
    assert [p.stem for p in ALL] == NAMES


def test_bootstrap_and_parameters_are_the_same_everywhere():
    heads = {tuple(c.source for c in code(p)[:2]) for p in ALL}
    assert len(heads) == 1
    parameters, bootstrap = heads.pop()
    assert "COURSE_PROFILE" in parameters
    assert len(bootstrap.splitlines()) <= 5
    for path in ALL:
        assert code(path)[0].metadata.get("tags") == ["parameters"]


@each
def test_valid_with_a_kernel_and_known_tags(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert {t for c in notebook.cells for t in c.metadata.get("tags", [])} <= TAGS


@each
def test_cells_are_short_and_narrow(path):
    sizes = sorted(len(lines(c)) for c in code(path) if lines(c))
    assert statistics.median(sizes) <= 6
    assert sizes[int(0.9 * (len(sizes) - 1))] <= 20
    assert sizes[-1] <= 30
    wide = [x for c in code(path) for x in c.source.splitlines() if len(x) > 79]
    assert wide == []


@each
def test_text_and_code_are_in_balance(path):
    kinds = [c.cell_type for c in read(path).cells]
    # A computation may be split over two cells; a lone code block may not.
    assert kinds[0] == "markdown" and kinds[-1] == "markdown"
    assert 0.5 <= kinds.count("markdown") / kinds.count("code") <= 2
    longest = max(len(run) for run in re.findall("c+", "".join(k[0] for k in kinds[6:])))
    assert longest <= 3


@each
def test_opening_says_what_to_expect(path):
    first = read(path).cells[0].source
    for word in ("Objectives", "Builds on", "Takes", "minutes", "2 cores", "GB"):
        assert word in first, word


@each
def test_imports_stand_in_one_cell(path):
    with_imports = [i for i, c in enumerate(code(path))
                    if re.search(r"(?m)^\s*(import|from) \w", c.source)]
    assert with_imports == [0, 1, 2]


@each
def test_plain_words(path):
    text = "\n".join(c.source for c in read(path).cells)
    for sign in ("\u2014", "TODO", "FIXME", "http://"):
        assert sign not in text


@each
def test_stored_outputs_belong_to_the_source(path):
    """They were made of this very source in the laptop profile."""
    notebook = read(path)
    run = notebook.metadata.course
    assert run.profile == "laptop"
    assert run.source_sha256 == source_hash(notebook)
    # Without the cores, which are those of the machine that ran it.
    assert takes(run.seconds, run.peak_mb).split(" on ")[0] in notebook.cells[0].source
    assert all(c.execution_count for c in code(path))
    assert any(c.outputs for c in code(path))


@each
def test_stored_outputs_are_clean(path):
    raw = path.read_text(encoding="utf-8")
    assert len(raw) <= 300_000
    assert "widgets" not in read(path).metadata
    for cell in code(path):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", cell.source
            shown = json.dumps(output)
            assert not re.search(r"/(root|home|tmp|work|Users)/|[A-Z]:\\\\", shown)
            assert "Warning" not in shown and "it/s]" not in shown


@each
def test_every_figure_has_words_below_it(path):
    cells = read(path).cells
    for cell, after in zip(cells, [*cells[1:], None], strict=True):
        if cell.cell_type == "code" and re.search(r"plt\.show\(\)", cell.source):
            assert after is not None and after.cell_type == "markdown"
            assert "In words" in after.source, cell.source


def test_the_readme_shows_the_stored_results():
    spec = importlib.util.spec_from_file_location("make", ROOT / "data" / "results" / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{make.BEGIN}\n{make.readme_table()}\n{make.END}" in readme


def test_profiles_offer_the_four_sizes():
    assert list(PROFILES) == ["smoke", "laptop", "reference", "gpu-7b"]
