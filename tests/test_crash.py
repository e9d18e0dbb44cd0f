"""Killed and run again: the old or the new, never half, the same in the end, and no litter."""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import killing
import nbformat
import psutil
import pytest
from conftest import ROOT

from lib import trainer
from lib.artifacts import BUILD, read_json, verified, write_json, writing
from lib.errors import UserError
from lib.scratch import _HOST, scratch
from lib.search import Journal

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork")
Run = Callable[..., int]
# Times and temporary numbers: different in every run.
TIMED = ("seconds", "whole_run", "cells", "peak_mb", "machine")


@pytest.fixture(scope="module")
def run(tiny_directory: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a writer in a fresh process, to its end or to a call; the calls it made, -1 if killed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("COURSE_DTYPE", "float32")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["killing"])

        def start(name: str, place: Path, at: int = 0) -> int:
            said = tmp_path_factory.mktemp("said") / "calls.json"
            process = context.Process(target=killing.work,
                                      args=(name, place, tiny_directory, at, said))
            process.start()
            process.join(300)
            assert process.exitcode == (0 if said.exists() else -9), (
                said.with_suffix(".txt").read_text())
            return read_json(said) if said.exists() else -1

        yield start


def plain(value: Any) -> Any:
    """JSON without what differs in every run."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in TIMED}
    return [plain(v) for v in value] if isinstance(value, list) else value


def contents(place: Path) -> dict[str, Any]:
    """All files and folders, hidden ones too; of notebooks and their pages only outputs."""
    found: dict[str, Any] = {}
    for path in sorted(place.rglob("*")):  # it follows no link
        name = path.relative_to(place).as_posix()
        if path.suffix == ".part" and not any(path.iterdir()):
            continue  # one stays where a file was put in place and is never written again
        if path.is_dir() or (name.startswith("build/course") and path.suffix == ".html"):
            found[name] = None
        elif path.suffix == ".ipynb":
            found[name] = [c.get("outputs") for c in nbformat.read(path, as_version=4).cells]
        elif path.suffix == ".json":
            found[name] = plain(read_json(path))
        else:
            found[name] = path.read_bytes()
    return found


def nothing_is_half(place: Path) -> None:
    """What stands under a name of its own can be read to its end."""
    for path in place.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(place).parts):
            continue
        if path.name == "manifest.json":
            verified(path.parent)
        elif path.suffix in (".json", ".ipynb"):
            read_json(path)
        elif path.name == "search.jsonl":
            rows = [json.loads(x) for x in path.read_text().split("\n")[:-1]]
            assert rows[0]["key"] == "toy"
        elif path.suffix == ".whl":
            assert path.stat().st_size == 300_000
        elif path.suffix == ".html" and path.name != "index.html":
            assert path.read_text().rstrip().endswith("</html>")


def leftovers(place: Path) -> list[Path]:
    """Work folders that nobody cleaned, outermost ones."""
    return [p for p in place.rglob("*.part") if not any(
        up.suffix == ".part" for up in p.relative_to(place).parents)]


def old(name: str, place: Path) -> None:
    """What an earlier run has left where a writer will write."""
    place.mkdir()
    if name == "artifact":
        with writing(place / "out", seed=1) as part:
            (part / "weights").write_text("old")
    elif name == "values":
        write_json(place / "new" / "value.json", "old")


def kill_and_rerun(run: Run, name: str, place: Path, kills: int | None, every: int) -> None:
    """Kill a writer at some calls or at all; after every so many kills it runs to its end."""
    old(name, place / "whole")
    calls = run(name, place / "whole")
    expected = contents(place / "whole")
    assert not leftovers(place / "whole")
    moments = [*range(1, calls + 1)]
    chosen = moments if kills is None else random.Random(name).sample(moments, min(kills, calls))
    killed = 0
    for number, at in enumerate(chosen, 1):
        here = place / "killed"
        if not here.exists():
            old(name, here)
        killed += run(name, here, at) == -1
        nothing_is_half(here)
        # Those of the run that has just died; never more with every run.
        assert len(leftovers(here)) <= 2
        if number % every == 0 or number == len(chosen):
            run(name, here)
            assert contents(here) == expected, at
            shutil.rmtree(here)
    assert killed  # one that goes on where another stopped makes fewer calls, and may end


@pytest.mark.parametrize(("name", "kills", "every"), [
    ("artifact", 12, 1), ("values", None, 4), ("figures", 3, 3), ("searched", 4, 4),
    ("fetched", 4, 2), ("trained", 3, 3), ("exported", 1, 1), ("presented", 3, 3), ("ran", 3, 3)])
def test_killed_and_run_again(run: Run, tmp_path: Path, name: str, kills: int | None,
                              every: int) -> None:
    kill_and_rerun(run, name, tmp_path, kills, every)


HOLD = """
import sys, time
from pathlib import Path
from lib.artifacts import writing
with writing(Path(sys.argv[1])) as part:
    (part / "half").touch()
    print(part, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that is writing tmp_path/out, and its work folder."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], cwd=ROOT,
                          stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def write(place: Path) -> None:
    with writing(place / "out") as part:
        (part / "weights").touch()


def test_only_a_dead_process_loses_its_folder(
        tmp_path: Path, holder: tuple[subprocess.Popen[str], Path]) -> None:
    process, part = holder
    write(tmp_path)
    with scratch(tmp_path / "out"), scratch(tmp_path / "out"):  # nor does this process
        assert (part / "half").exists() and len(leftovers(tmp_path)) == 3
    # Its number in a folder that is older than the process was another's.
    reused = part.with_name(part.name.replace(".part", "x.part"))
    reused.mkdir()
    os.utime(reused, (1, 1))
    write(tmp_path)
    assert leftovers(tmp_path) == [part]
    process.kill()
    # Nobody has waited for it yet: it is a zombie, and still has its number.
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_number_of_a_container_is_always_the_same(tmp_path: Path) -> None:
    mine = tmp_path / f".out.{_HOST}-{os.getpid()}-abc.part"
    mine.mkdir()
    write(tmp_path)
    assert not mine.exists()


@pytest.mark.parametrize("name", [
    ".out.0-1-abc.part", ".out.part", ".out.mine", f".out.{_HOST}-x-abc.part",
    f".out2.{_HOST}-999999999-abc.part", f".out.{_HOST}-999999999-abc"])
def test_what_another_machine_or_a_person_made_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    write(tmp_path)
    assert (tmp_path / name).is_dir()


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    for name in ("[ab]", "a"):
        (tmp_path / f".{name}.{_HOST}-999999999-abc.part").mkdir()
    with writing(tmp_path / "[ab]"):
        pass
    assert [p.name for p in leftovers(tmp_path)] == [f".a.{_HOST}-999999999-abc.part"]


@pytest.mark.parametrize("left", [
    ("checkpoint-4/manifest.json", "checkpoint-4/state.safetensors"),  # its identity went first
    ("checkpoint-4/manifest.json",)])
def test_a_work_directory_that_was_half_removed_is_not_gone_on_with(
        tmp_path: Path, left: tuple[str, ...]) -> None:
    work = tmp_path / ".out.work"
    for name in left:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("{}")
    trainer._begin(work, {"seed": 1})
    assert [p.name for p in work.iterdir()] == ["identity.json"]
    assert trainer.last_checkpoint(work) is None


def test_a_journal_of_which_only_the_start_was_written(tmp_path: Path) -> None:
    """As an earlier version left it, or a full disk."""
    (tmp_path / "j.jsonl").write_text("")
    with pytest.raises(UserError, match="belongs to another search"):
        Journal(tmp_path / "j.jsonl", "a")
    Journal(tmp_path / "k.jsonl", "a")
    assert (tmp_path / "k.jsonl").read_text() == '{"key": "a"}\n'


@pytest.mark.parametrize("fails", [True, False])
def test_folders_above_that_stay_empty_go_again(tmp_path: Path, fails: bool) -> None:
    (tmp_path / "mine").mkdir()
    try:
        with writing(tmp_path / "mine" / "new" / "out"):
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "new" / "out").is_dir() is not fails
    assert (tmp_path / "mine" / "new").exists() is not fails


@pytest.mark.long
@pytest.mark.parametrize("name", killing.WRITERS)
def test_killed_at_many_calls(run: Run, tmp_path: Path, name: str) -> None:
    kill_and_rerun(run, name, tmp_path, 30 if name in ("exported", "ran") else None, 1)


# Commands on the real model, as they are typed; %s is the place.
COMMANDS = {
    "train": "train --data data.jsonl --steps 60 --rank 4 --targets minimal --batch-size 4 "
             "--max-length 64 --out out",
    "export": "export --merge adapter --out out",
    "packed": "deploy --budget-mb 80 --out out",
    "gguf": "deploy --format gguf --budget-mb 90 --out out",
    "limits": "deploy --budget-mb 80 --memory-mb 2000 --out out",
    "run": "run --profile smoke --only 02",
    "slides": "slides --out out",
    "site": "site --out out",
    "bench": "bench dtypes --json out.json",
}


def command(name: str, place: Path, seconds: float = 1e4) -> bool:
    """Type a command and kill it after some seconds; whether it ended before."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "TMPDIR": str(place / "tmp"), "COURSE_BUILD": str(place / "build"),
        "COURSE_DTYPE": "float32", "JUPYTER_RUNTIME_DIR": str(place / "tmp")}
    with (place.parent / "said.txt").open("a") as said, subprocess.Popen(
            [sys.executable, "-m", "lib", *COMMANDS[name].split()], cwd=place, env=environment,
            stdout=said, stderr=said) as process:
        try:
            # A finished deployment is not written over: that, too, is an end.
            assert process.wait(seconds) in (0, 2), (place.parent / "said.txt").read_text()
            return True
        except subprocess.TimeoutExpired:
            process.kill()
            return False


def prepare(name: str, place: Path) -> None:
    """An empty place with the base model, data and an adapter."""
    (place / "tmp").mkdir(parents=True)
    (place / "build").mkdir()
    (place / "build" / "models").symlink_to(BUILD / "models")
    (place / "data.jsonl").write_text("".join(
        f'{{"instruction": "Unit {i}?", "response": "It is {i}."}}\n' for i in range(40)))
    if name == "export":
        shutil.copytree(ROOT / "data" / "adapters" / "sensors_qlora", place / "adapter")


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_at_thirty_moments(tmp_path: Path, name: str) -> None:
    moments, kills = random.Random(name), int(os.environ.get("COURSE_KILLS", "30"))
    prepare(name, tmp_path / "whole")
    start = time.monotonic()
    assert command(name, tmp_path / "whole")
    length, expected = time.monotonic() - start, contents(tmp_path / "whole")
    here, ended = tmp_path / "killed", 0
    for number in range(1, kills + 1):
        if not here.exists():
            prepare(name, here)
        ended += command(name, here, moments.uniform(0, length))
        nothing_is_half(here)
        assert len(leftovers(here)) <= 4
        if number % 5 == 0 or number == kills:
            assert command(name, here)
            found = contents(here)
            assert found.keys() == expected.keys()
            differing = [k for k in found if found[k] != expected[k]]
            assert not [k for k in differing if not k.endswith(VARYING[name])], differing
            shutil.rmtree(here)
    assert ended < kills


# What two undisturbed runs do not have in common: figures that were measured.
VARYING: dict[str, tuple[str, ...]] = dict.fromkeys(COMMANDS, ("none",)) | {
    "run": (".ipynb", ".json", ".html"), "bench": ("out.json",)}
