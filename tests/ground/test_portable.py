"""lib on every system: names of one system stand behind a guard. Ruff checks encodings."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from lib.errors import UserError
from lib.quantize.gguf import export

MODULES = sorted((ROOT / "lib").rglob("*.py"))
# Absent under Windows, or of another meaning there.
POSIX = {
    "os.fork", "os.kill", "os.killpg", "os.setsid", "os.getuid", "os.uname", "os.sysconf",
    "os.nice", "os.mkfifo", "os.chown", "os.getloadavg", "os.sched_getaffinity", "os.symlink",
    "signal.SIGKILL", "signal.SIGHUP", "signal.SIGALRM", "signal.SIGUSR1", "signal.alarm",
    "socket.SO_REUSEADDR", "socket.AF_UNIX", "preexec_fn", "start_new_session", "fcntl",
    "resource", "pwd", "termios"}
SYSTEMS = ("os.name", "sys.platform", "platform.system", "system ==")


def nodes(node: ast.AST, above: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.AST, tuple]]:
    """Every node with those above it."""
    yield node, above
    for child in ast.iter_child_nodes(node):
        yield from nodes(child, (*above, node))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_names_of_one_system_are_guarded(path: Path) -> None:
    for node, above in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        names: set[str] = set()
        if isinstance(node, ast.Attribute):
            names = {ast.unparse(node)}
        elif isinstance(node, ast.keyword):
            names = {node.arg or ""}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        guarded = any(isinstance(up, ast.If) and any(s in ast.unparse(up.test) for s in SYSTEMS)
                      for up in above)
        assert guarded or not names & POSIX, f"line {node.lineno}: {names & POSIX}"


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
