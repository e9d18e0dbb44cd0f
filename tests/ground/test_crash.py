"""Killed and run again: the old artifact or the new one, never half, and the same in the end.

A writer dies just before its n-th call that touches its folder, so the moment is the same on
every machine. Writers are forked from one process that has imported what they need.
"""

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lib.train.training
from lib.files import sha256, verified, writing
from lib.settings import TrainSettings

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
EVENTS = ("open", "os.rename", "os.mkdir", "os.chmod")
# These name a path only relative to a folder that is open.
REMOVALS = ("os.remove", "os.rmdir")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that writers are forked from has the path of this one."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def artifact(place: Path) -> None:
    with writing(place / "out", seed=7) as part:
        (part / "weights").write_bytes(bytes(100_000))
        with writing(part / "adapter") as inner:
            (inner / "config.json").write_text("{}")


def training(place: Path, model: str) -> None:
    os.environ["COURSE_DTYPE"] = "float32"
    lib.train.training.CHECKPOINT_EVERY = 2
    settings = TrainSettings(steps=6, batch_size=2, rank=2, learning_rate=2e-2, dropout=0.1)
    records = [{"instruction": f"Unit {i}?", "response": f"It is {i}."} for i in range(6)]
    lib.train.training.train(records, settings, model=model, out=place / "out")


def counted(writer: Callable[..., None], place: Path, at: int, total: Any, *model: str) -> None:
    """Run a writer and count its calls in `total`; it dies just before the `at`-th."""
    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event in REMOVALS or (event in EVENTS and str(arguments[0]).startswith(str(place))):
            total.value += 1
            if total.value == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    writer(place, *model)


def run(writer: Callable[..., None], place: Path, at: int = 0, *model: str) -> int:
    """Run a writer in a process of its own, killed at a call or to its end: the calls made."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    total = context.Value("i", lock=False)
    process = context.Process(target=counted, args=(writer, place, at, total, *model),
                              daemon=True)  # one that hangs ends with the tests
    process.start()
    process.join(300)
    assert process.exitcode == (-signal.SIGKILL if at else 0)
    return total.value


def old_artifact(place: Path) -> dict[str, str]:
    """The files of an artifact that a writer will replace."""
    place.mkdir()
    with writing(place / "out", seed=1) as part:
        (part / "weights").write_text("old")
    return verified(place / "out")["files"]


def test_files_killed_at_each_call(tmp_path: Path) -> None:
    old = old_artifact(tmp_path / "whole")
    calls = run(artifact, tmp_path / "whole")
    new = verified(tmp_path / "whole" / "out")["files"]
    assert calls > 15 and old != new
    seen = []
    for at in range(1, calls + 1):
        place = tmp_path / "killed"
        old_artifact(place)
        run(artifact, place, at)
        seen.append(verified(place / "out")["files"])
        run(artifact, place)
        assert verified(place / "out")["files"] == new
        assert {p.suffix for p in place.iterdir()} <= {"", ".part"}
        shutil.rmtree(place)
    assert old in seen and new in seen
    assert seen == sorted(seen, key=lambda files: files == new)  # from one moment on the new one


def test_training_killed_and_resumed(tmp_path: Path, tiny_directory: str) -> None:
    calls = run(training, tmp_path / "whole", 0, tiny_directory)
    run(training, tmp_path / "killed", calls * 2 // 3, tiny_directory)
    work = tmp_path / "killed" / ".out.work"
    assert list(work.glob("checkpoint-*")) and not (tmp_path / "killed" / "out").exists()
    run(training, tmp_path / "killed", 0, tiny_directory)
    adapter = "out/adapter_model.safetensors"
    assert sha256(tmp_path / "killed" / adapter) == sha256(tmp_path / "whole" / adapter)
    assert not work.exists()
