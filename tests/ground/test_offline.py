"""No network except where the README says so; no secret in files, artifacts or output."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

WATCH = ROOT / "tests" / "watch"
CANARY = "canary-0f4b1d9e7c"
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY",
           "GITHUB_TOKEN", "WANDB_API_KEY", "DB_PASSWORD")

# What the README has a user do, at the size of the tests.
WORK = """
import sys
from pathlib import Path

from lib.__main__ import main
from lib.client import ask_all, question
from lib.serve.server import running

tiny = sys.argv[1]
Path("good.jsonl").write_text('{"instruction": "Unit?", "response": "It is."}\\n' * 4)
assert main(["train", "--data", "good.jsonl", "--model", tiny, "--steps", "2", "--batch-size", "2",
             "--rank", "2", "--out", "mine"]) == 0
assert main(["export", "--adapter", "mine=mine", "--model", tiny, "--out", "edge"]) == 0
with running(Path("edge")) as served:
    assert len(ask_all(served.url, [question("Unit?", model="mine", max_tokens=2)])) == 1
assert main(["doctor"]) in (0, 2)
"""

FETCH = """
import os
os.environ.pop("COURSE_WHEEL", None)
from lib.base.embedded import locate
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


@pytest.fixture(scope="module")
def work(tiny_directory: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    place = tmp_path_factory.mktemp("offline")
    return place, watched(WORK, place, tiny_directory)


def test_what_the_readme_says_needs_no_network(work: tuple[Path, Ran]) -> None:
    place, ran = work
    assert ran.status == 0, ran.said[-2000:]
    for name in ("mine", "edge"):
        assert (place / name).is_dir()
    assert ran.asked == []


def test_no_secret_of_the_environment_is_written_or_said(work: tuple[Path, Ran]) -> None:
    place, ran = work
    assert CANARY not in ran.said
    written = [p for p in place.rglob("*") if p.is_file()]
    assert len(written) > 6
    assert [p for p in written if CANARY.encode() in p.read_bytes()] == []


@pytest.mark.skipif(not importlib.util.find_spec("pip"), reason="there is no pip to ask")
def test_only_the_wheel_is_fetched_and_by_pip(tmp_path: Path) -> None:
    ran = watched(FETCH, tmp_path, PIP_RETRIES="0", COURSE_BUILD=str(tmp_path / "build"))
    assert "connect to the network once, or set COURSE_WHEEL" in ran.said
    assert ran.asked and all(line.startswith("-m pip download") for line in ran.asked)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
