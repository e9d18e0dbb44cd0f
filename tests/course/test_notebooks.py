"""House style of the notebooks, and that stored outputs belong to the source."""

import ast
import json
import re
import statistics
from pathlib import Path

import nbformat
import pytest

from data.evidence.notebooks import source_hash, takes
from data.evidence.tables import readme_table
from lib.course.run import notebooks
from lib.files import ROOT

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
    rooms = re.findall(r"(?m)^from (lib[\w.]*) import", code(path)[2].source)
    assert len(rooms) == len(set(rooms)) <= 6
    assert len(re.findall(r"\bstart\(", "\n".join(c.source for c in code(path)))) == 1


@each
def test_plain_words(path):
    text = "\n".join(c.source for c in read(path).cells)
    for sign in ("\u2014", "TODO", "FIXME", "http://"):
        assert sign not in text


@each
def test_no_cell_asks_a_proxy(path):
    """A proxy set for the network is not for a server on this machine."""
    for node in (n for c in code(path) for n in ast.walk(ast.parse(c.source))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("httpx."):
            assert "trust_env=False" in ast.unparse(node), ast.unparse(node)


def tagged(path: Path, tag: str) -> list[ast.stmt]:
    """Top-level statements of the code cells with a tag."""
    return [node for c in code(path) if tag in c.metadata.get("tags", [])
            for node in ast.parse(c.source).body]


def is_stub(node: ast.stmt) -> bool:
    """An annotated function of a one-line docstring that raises NotImplementedError."""
    return (isinstance(node, ast.FunctionDef) and len(node.body) == 2
            and "\n" not in (ast.get_docstring(node) or "\n")
            and ast.unparse(node.body[1]) == "raise NotImplementedError"
            and node.returns is not None and all(a.annotation for a in node.args.args))


def checks(nodes: list[ast.stmt]) -> dict[str, str]:
    """{function: what else `check` gets}, each function once."""
    calls = [node.value for node in nodes if isinstance(node, ast.Expr)
             and ast.unparse(node).startswith("check(")]
    found = {ast.unparse(call.args[0]): ast.unparse(call).partition(",")[2] for call in calls}
    assert len(found) == len(calls)
    return found


def bound(nodes: list[ast.stmt]) -> set[str]:
    """Names that statements bind in the notebook itself: not in functions or comprehensions."""
    names, left = set(), list(nodes)
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif not isinstance(node, ast.comprehension):
            left += ast.iter_child_nodes(node)
    return names


@pytest.mark.parametrize("name", NAMES)
def test_exercises_have_a_stub_a_check_and_a_solution(name):
    path = next(p for p in ALL if p.stem == name)
    asked, solved = tagged(path, "exercise"), tagged(path, "solution")
    stubs = [node.name for node in asked if is_stub(node)]
    assert len(stubs) >= 3
    solutions = [n.name for n in solved if isinstance(n, ast.FunctionDef)]
    assert solutions == [f"{stub}_solution" for stub in stubs]
    # Both go through the same check, and no learner's function is overwritten.
    assert checks(solved) == {f"{stub}_solution": rest for stub, rest in checks(asked).items()}
    assert list(checks(asked)) == stubs
    assert not bound(asked) & bound(solved)


@pytest.mark.parametrize("name", NAMES)
def test_exercises_are_numbered_and_have_three_levels(name):
    path = next(p for p in ALL if p.stem == name)
    heads = [re.match(r"### Exercise (\d) \((warm-up|core|challenge)\): \S", c.source)
             for c in read(path).cells if c.source.startswith("### Exercise")]
    assert all(heads)
    assert [int(h[1]) for h in heads] == list(range(1, len(heads) + 1))
    assert {h[2] for h in heads} == {"warm-up", "core", "challenge"}
    assert len(heads) == sum(map(is_stub, tagged(path, "exercise")))


@pytest.mark.parametrize("name", NAMES)
def test_exercises_leave_the_notebooks_names_alone(name):
    path = next(p for p in ALL if p.stem == name)
    extra = tagged(path, "exercise") + tagged(path, "solution")
    others = [node for c in code(path)
              if not {"exercise", "solution"} & set(c.metadata.get("tags", []))
              for node in ast.parse(c.source).body]
    used = {n.id for node in others for n in ast.walk(node) if isinstance(n, ast.Name)}
    assert bound(extra) & (used | bound(others)) == set()
    assert bound(others) & {"check", "differs"} == set()


@each
def test_stored_outputs_belong_to_the_source(path):
    """They were made of this very source in the laptop profile."""
    notebook = read(path)
    run = notebook.metadata.course
    assert run.profile == "laptop"
    assert run.source_sha256 == source_hash(notebook)
    assert takes(run) in notebook.cells[0].source
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
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"<!-- results -->\n{readme_table()}\n<!-- end of results -->" in readme
