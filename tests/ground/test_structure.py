"""The house: its size, its rooms, imports that point one way, nothing pickled."""

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

LIB = ROOT / "lib"
MODULES = sorted(LIB.rglob("*.py"))
IDS = [path.relative_to(LIB).as_posix() for path in MODULES]
GROUND = {"client", "errors", "files", "host", "settings"}
# A room imports the ground and the rooms to its left; `serve` imports the ground alone.
ROOMS = ("serve", "base", "evaluate", "train", "quantize", "coa", "deploy", "course")
LINES = 5400  # every line of every module: the measured figure, rounded up to 50
SERVE_LINES = 575  # those of the server alone


def imported(path: Path) -> set[str]:
    """Dotted names that a module imports, also inside its functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_lib_is_thin() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert sum(lines.values()) <= LINES
    assert sum(n for path, n in lines.items() if path.parent.name == "serve") <= SERVE_LINES
    assert len(list(LIB.glob("*.py"))) <= 7
    assert {path.parent.name for path in MODULES} == {"lib", *ROOMS}
    for room in ROOMS:
        assert len(list((LIB / room).glob("*.py"))) <= 8, room


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_imports_point_one_way(path: Path) -> None:
    packages = {name.split(".")[0] for name in imported(path)}
    assert not packages & {"tests", "notebooks", "data", "conftest"}
    names = {name.split(".")[1] for name in imported(path) if name.startswith("lib.")}
    room = path.parent.name
    if room == "serve":
        assert names <= GROUND | {"serve", "exports"}
    elif room in ROOMS:
        assert names <= GROUND | {room, "exports", *ROOMS[:ROOMS.index(room)]}
    elif path.name != "__main__.py":  # the command line starts all the rest
        assert names <= GROUND


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_offers_its_names_lazily(room: str) -> None:
    """An `__init__` imports only `lib.exports`; each name it declares is where it says."""
    assert imported(LIB / room / "__init__.py") == {"lib.exports"}
    package = importlib.import_module(f"lib.{room}")
    assert package.__all__
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Each room's modules can be put in an order, too."""
    def name(path: Path) -> str:
        return ".".join(path.relative_to(ROOT).with_suffix("").parts)

    known = {name(path) for path in MODULES}
    graph = {name(path): {found for dotted in imported(path)
                          for found in (dotted, dotted.rpartition(".")[0]) if found in known}
             for path in MODULES}
    assert {"lib.files", "lib.errors"} <= graph["lib.train.training"] | graph["lib.files"]
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_what_a_module_does_not_load() -> None:
    """In one process, the lightest first: what one loads counts against those after it, too."""
    code = "import sys\n"
    for module, absent in (
            ("lib.serve.server", {"torch", "lark"}), ("lib.client", {"torch"}),
            ("lib.__main__", {"torch"}), ("lib.course.doctor", {"torch"}),
            ("lib.deploy.packed", {"sklearn", "trl"}), ("lib.quantize.gguf", {"sklearn", "trl"})):
        code += f"import {module}; assert not {absent} & sys.modules.keys(), '{module}'\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_nothing_is_pickled_or_trusted(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    modules = {name.split(".")[0] for name in imported(path)}
    assert not modules & {"pickle", "dill", "cloudpickle", "joblib"}
    for call in ("torch.load(", "torch.save(", "np.load(", "trust_remote_code"):
        assert call not in source


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_a_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
