"""Killed and run again: the old artifact or the new one, never half, and the same in the end."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from lib.files import sha256, verified, writing

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")


def run(name: str, place: Path, at: int = 0, *model: str) -> int:
    """Run a writer in a process of its own; the calls it made, -1 if it was killed."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "killing.py", name, place, str(at), *model],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                          "COURSE_DTYPE": "float32"})
    assert done.returncode == (-9 if at else 0), done.stderr
    return -1 if at else int(done.stdout.split()[-1])


def old_artifact(place: Path) -> dict[str, str]:
    """The files of an artifact that a writer will replace."""
    place.mkdir()
    with writing(place / "out", seed=1) as part:
        (part / "weights").write_text("old")
    return verified(place / "out")["files"]


def test_files_killed_at_each_call(tmp_path: Path) -> None:
    old = old_artifact(tmp_path / "whole")
    calls = run("artifact", tmp_path / "whole")
    new = verified(tmp_path / "whole" / "out")["files"]
    assert calls > 15 and old != new
    seen = []
    for at in range(1, calls + 1):
        place = tmp_path / "killed"
        old_artifact(place)
        run("artifact", place, at)
        seen.append(verified(place / "out")["files"])
        run("artifact", place)
        assert verified(place / "out")["files"] == new
        assert {p.suffix for p in place.iterdir()} <= {"", ".part"}
        shutil.rmtree(place)
    assert old in seen and new in seen
    assert seen == sorted(seen, key=lambda files: files == new)  # from one moment on the new one


def test_training_killed_and_resumed(tmp_path: Path, tiny_directory: str) -> None:
    calls = run("training", tmp_path / "whole", 0, tiny_directory)
    run("training", tmp_path / "killed", calls * 2 // 3, tiny_directory)
    work = tmp_path / "killed" / ".out.work"
    assert list(work.glob("checkpoint-*")) and not (tmp_path / "killed" / "out").exists()
    run("training", tmp_path / "killed", 0, tiny_directory)
    adapter = "out/adapter_model.safetensors"
    assert sha256(tmp_path / "killed" / adapter) == sha256(tmp_path / "whole" / adapter)
    assert not work.exists()
