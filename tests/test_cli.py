"""The command line where it works, and when it is stopped; mistakes: test_bad_input.py."""

import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import lib.course
import lib.measure
import lib.slides
import lib.train
from lib.__main__ import main
from lib.artifacts import verified

pytestmark = pytest.mark.usefixtures("float32")

GOOD = b'{"instruction": "Unit %d?", "response": "It is %d."}\n'
TRAIN = ["train", "--data", "good.jsonl", "--out", "out", "--model", "TINY"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with data; builds go there, too."""
    (tmp_path / "good.jsonl").write_bytes(b"".join(GOOD % (i, i) for i in range(6)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSE_PROFILE", "smoke")
    monkeypatch.setattr(lib.measure, "BUILD", tmp_path / "build")
    return tmp_path


def test_full_disk(place: Path, tiny_directory: str, monkeypatch: pytest.MonkeyPatch,
                   capfd: pytest.CaptureFixture[str]) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    assert main([tiny_directory if a == "TINY" else a for a in TRAIN] + ["--steps", "2"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: cannot write") and err.count("\n") == 1
    assert not (place / "out").exists()


def test_trains_an_adapter_and_says_so(place: Path, tiny_directory: str,
                                       capfd: pytest.CaptureFixture[str]) -> None:
    """The table of bad input fails for its reasons: without them the command works."""
    arguments = [tiny_directory if a == "TINY" else a for a in TRAIN]
    assert main([*arguments, "--steps", "2", "--rank", "4", "--targets", "minimal",
                 "--batch-size", "2", "--rslora"]) == 0
    out, err = capfd.readouterr()
    settings = verified(place / "out")["settings"]
    assert settings["mode"] == "qlora" and settings["rslora"] is True
    assert (settings["rank"], settings["steps"], settings["targets"]) == (4, 2, "minimal")
    # 2 layers, rank 4: q_proj 64 x 64, v_proj 32 x 64
    assert out.splitlines()[-1].startswith("out: 1,792 of ")
    assert err == ""
    assert {p.name for p in place.iterdir()} == {"good.jsonl", "out"}


def test_ctrl_c(place: Path, monkeypatch: pytest.MonkeyPatch,
                capfd: pytest.CaptureFixture[str]) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lib.train, "train", stop)
    monkeypatch.setattr(lib.course, "run", stop)
    monkeypatch.setattr(lib.slides, "build", stop)
    for command, advice in ((["train", "--data", "good.jsonl", "--out", "out"], "same command"),
                            (["run"], "--only NN"), (["slides"], "start it again")):
        assert main(command) == 130
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and advice in err
        assert ("checkpoint" in err) == (command[0] == "train")  # no other has one


@pytest.fixture
def fake_bench(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A benchmark that takes no time; says whether it ran."""
    ran: list[str] = []

    def quick() -> dict[str, Any]:
        ran.append("quick")
        return {"ratio": 1.5, "machine": {"cores": 2}}

    module = types.ModuleType("lib.bench_quick")
    module.quick = quick  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lib.bench_quick", module)
    monkeypatch.setattr("lib.bench.BENCHES", {"quick": "quick"})
    return ran


def test_bench_prints_and_keeps(place: Path, fake_bench: list[str],
                                capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quick", "--json", "new/bench.json"]) == 0
    assert "ratio" in (out := capfd.readouterr().out) and "1.5" in out
    stored = json.loads((place / "new" / "bench.json").read_text())
    assert stored.pop("versions")["torch"]
    assert stored == {"ratio": 1.5, "machine": {"cores": 2}}
    assert fake_bench == ["quick"]


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["run", "-h"]])
def test_help(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "usage: python -m lib" in capfd.readouterr().out


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(place: Path, tiny_directory: str) -> Start:
    """Start `python -m lib ...` as a user would, in the test's own folder."""
    def begin(*arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
        return subprocess.Popen(
            [sys.executable, "-m", "lib", *[tiny_directory if a == "TINY" else a
                                            for a in arguments]],
            cwd=place, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # A shell that put the tests into the background told them to ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    return begin


def test_real_ctrl_c_in_training_and_the_next_run(
    start: Start, place: Path, tiny_directory: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGINT after a step: 130 and one line, no artifact; then the command works."""
    command = [*TRAIN, "--mode", "lora", "--rank", "2", "--batch-size", "2"]
    process = start(*command, "--steps", "100000")
    assert process.stdout
    assert process.stdout.readline().startswith("step ")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.count("\n") == 1 and err.startswith("stopped")
    assert not (place / "out").exists()
    again = [tiny_directory if a == "TINY" else a for a in command]
    assert main([*again, "--steps", "2"]) == 0
    assert capfd.readouterr().err == ""
    assert verified(place / "out")["settings"]["steps"] == 2
    assert not list(place.glob(".out*"))
