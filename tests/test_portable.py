"""lib on every system: text has an encoding, names of one system stand behind a guard."""

import ast
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from lib.artifacts import swap
from lib.errors import UserError
from lib.gguf import export

MODULES = sorted((ROOT / "lib").glob("*.py"))
# Not on Windows, or of another meaning there.
POSIX = {
    "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.setsid", "os.getuid", "os.geteuid",
    "os.getgid", "os.uname", "os.sysconf", "os.nice", "os.wait", "os.mkfifo", "os.chown",
    "os.getloadavg", "os.sched_getaffinity", "os.symlink", "signal.SIGKILL", "signal.SIGHUP",
    "signal.SIGALRM", "signal.SIGUSR1", "signal.SIGUSR2", "signal.SIGCHLD", "signal.SIGXFSZ",
    "signal.alarm", "signal.setitimer", "signal.pause", "socket.SO_REUSEADDR",
    "socket.AF_UNIX", "ctypes.windll", "preexec_fn", "start_new_session",
    "fcntl", "resource", "pwd", "grp", "termios", "pty"}
SYSTEMS = ("os.name", "sys.platform", "platform.system", "system ==")


def walk(node: ast.AST, above: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.AST, tuple]]:
    """Every node with those above it."""
    yield node, above
    for child in ast.iter_child_nodes(node):
        yield from walk(child, (*above, node))


def without_encoding(source: str) -> list[int]:
    """Lines that read, write or pass text in whatever encoding the system has."""
    found = []
    for node, _ in walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: k.value for k in node.keywords}
        # Path.open has its mode first, open() second.
        modes = [*node.args[0 if "." in name else 1:], given.get("mode")]
        binary = any(isinstance(m, ast.Constant) and "b" in str(m.value) for m in modes if m)
        method = name.rpartition(".")[2]
        opens = method == "open" and not name.startswith(("Image.", "os."))
        if "encoding" not in given and (
                method in ("read_text", "write_text") or (opens and not binary)
                or any(key in given for key in ("text", "universal_newlines"))):
            found.append(node.lineno)
    return found


def of_one_system(source: str) -> list[str]:
    """Names and paths that only some systems have, where nothing guards them."""
    found = []
    for node, above in walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.keyword):
            names = [node.arg or ""]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = ["a path"] if node.value.startswith(("/proc", "/sys", "/dev", "/tmp")) else []
        guarded = any(
            (isinstance(up, ast.If) and any(s in ast.unparse(up.test) for s in SYSTEMS))
            or (isinstance(up, ast.With) and "suppress(OSError" in ast.unparse(up.items[0]))
            for up in above)
        found += [f"{node.lineno}: {name}" for name in names
                  if name in POSIX | {"a path"} and not guarded]
    return found


@pytest.mark.parametrize("path", MODULES, ids=[p.stem for p in MODULES])
def test_every_text_has_an_encoding(path: Path) -> None:
    assert without_encoding(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", MODULES, ids=[p.stem for p in MODULES])
def test_names_of_one_system_are_guarded(path: Path) -> None:
    assert of_one_system(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", MODULES, ids=[p.stem for p in MODULES])
def test_paths_are_paths_and_scratch_may_stay(path: Path) -> None:
    """Windows deletes no mapped file: a scratch folder must not fail for that."""
    source = path.read_text(encoding="utf-8")
    assert "os.path" not in source and "os.sep" not in source
    # `lib.scratch` does it, and cleans up after a killed run, too.
    assert "TemporaryDirectory(" not in source
    assert source.count("mkdtemp(") == (path.stem == "scratch")


@pytest.mark.parametrize("bad", [
    "open('x')", "open('x', 'w')", "p.open()", "p.open('a')", "p.read_text()",
    "p.write_text('x', newline='')", "subprocess.run(c, text=True)"])
def test_the_first_check_can_fail(bad: str) -> None:
    assert without_encoding(bad) == [1]


@pytest.mark.parametrize("good", [
    "open('x', 'rb')", "p.open('rb')", "p.open(encoding='utf-8')", "Image.open(x)",
    "open('x', mode='wb')", "p.read_text(encoding='utf-8')", "subprocess.run(c)",
    "safe_open(f, 'pt')", "subprocess.run(c, text=True, encoding='utf-8')"])
def test_the_first_check_can_pass(good: str) -> None:
    assert without_encoding(good) == []


@pytest.mark.parametrize("bad", [
    "os.fork()", "import fcntl", "from os import fork", "p.send_signal(signal.SIGKILL)",
    "Popen(c, preexec_fn=f)", "read('/proc/self/maps')", "if x:\n    os.fork()"])
def test_the_second_check_can_fail(bad: str) -> None:
    assert len(of_one_system(bad)) == 1


def test_the_second_check_can_pass() -> None:
    assert of_one_system("if os.name == 'posix':\n    os.fork()\n"
                         "with suppress(OSError):\n    read('/proc/self/maps')") == []


def test_git_leaves_line_ends_alone() -> None:
    """Else a checkout under Windows breaks the hashes of the shipped adapters."""
    lines = (ROOT / ".gitattributes").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["* -text"]
    for file in (ROOT / "data" / "adapters").rglob("*.json"):
        assert b"\r" not in file.read_bytes(), file


def test_swap_into_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows renames over nothing that exists."""
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if target.exists():
            raise FileExistsError(target)
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    for name in ("part", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "part" / "file").touch()
    swap(tmp_path / "part", tmp_path / "out")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == [
        "out", "out/file"]


def test_swap_lets_go_of_what_is_forgotten(tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor in a cycle keeps its file mapped, and Windows then moves nothing."""
    real_rename, real_collect, held = Path.rename, gc.collect, ["a forgotten tensor"]

    def rename(self: Path, target: Path) -> Path:
        if held:
            raise PermissionError(13, "Access is denied")
        return real_rename(self, target)

    (tmp_path / "part").mkdir()
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(PermissionError):
        swap(tmp_path / "part", tmp_path / "out")
    assert (tmp_path / "part").is_dir()
    monkeypatch.setattr(gc, "collect", lambda *_: held.clear() or real_collect())
    swap(tmp_path / "part", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["a:b", "a/b", "..", "../x", ".x", "model", "base", "a b", ""])
def test_an_adapters_name_is_a_file_name_everywhere(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter name .* makes no file"):
        export(tmp_path / "out", adapters={name: tmp_path / "adapter"})
    assert list(tmp_path.iterdir()) == []
