"""The command line where it works, and when it is stopped; mistakes: test_bad_input.py."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import lib.__main__
from lib.__main__ import main, user_message
from lib.errors import UserError
from lib.files import verified
from lib.host import cores, is_main_process, is_sharded, process_count

pytestmark = pytest.mark.usefixtures("float32")

GOOD = b'{"instruction": "Unit %d?", "response": "It is %d."}\n'


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with data."""
    (tmp_path / "good.jsonl").write_bytes(b"".join(GOOD % (i, i) for i in range(6)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def training(model: str, *options: str) -> list[str]:
    return ["train", "--data", "good.jsonl", "--out", "out", "--model", model, *options]


def test_trains_an_adapter_and_prints_a_line(place: Path, tiny_directory: str,
                                             capfd: pytest.CaptureFixture[str]) -> None:
    """Without their mistakes the commands of test_bad_input work."""
    assert main(training(tiny_directory, "--steps", "2", "--rank", "4", "--targets", "minimal",
                         "--batch-size", "2", "--rslora")) == 0
    out, err = capfd.readouterr()
    settings = verified(place / "out")["settings"]
    assert verified(place / "out")["data"] == str(place / "good.jsonl")  # `deploy` reads it, too
    assert settings["mode"] == "qlora" and settings["rslora"] is True
    assert (settings["rank"], settings["steps"], settings["targets"]) == (4, 2, "minimal")
    # 2 layers, rank 4: q_proj 64 x 64, v_proj 32 x 64
    assert out.splitlines()[-1].startswith("out: 1,792 of ")
    assert err == ""
    assert {p.name for p in place.iterdir()} == {"good.jsonl", "out"}


def test_full_fine_tuning_has_a_rate_of_its_own(place: Path, tiny_directory: str) -> None:
    assert main(training(tiny_directory, "--steps", "1", "--mode", "full")) == 0
    assert verified(place / "out")["settings"]["learning_rate"] == 3e-4


@pytest.mark.skipif(os.name != "posix", reason="there is no limit of a file's size")
def test_a_full_disk_for_real(place: Path) -> None:
    """The kernel refuses more than 64 kB a file."""
    code = """
import resource, signal, sys
import numpy as np
from pathlib import Path
from safetensors.numpy import save_file
import lib.__main__
from lib.files import writing
def full(_):
    with writing(Path("out")) as part:
        save_file({"w": np.ones(100_000)}, part / "model.safetensors")
lib.__main__.dispatch = full
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
sys.exit(lib.__main__.main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert [p.name for p in place.iterdir()] == ["good.jsonl"]


@pytest.mark.parametrize(("error", "message"), [
    (UserError("two\nlines"), "two lines"),
    (PermissionError(13, "Permission denied", "x"), "Permission denied: 'x': check the path"),
    (ModuleNotFoundError("x", name="gguf.writer"), "gguf.writer is not installed"),
    (ModuleNotFoundError("x", name="lib.nothing"), ""), (ConnectionRefusedError(111, "x"), ""),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory is short"),
    (OSError("no number"), ""), (ValueError("x"), "")])
def test_which_errors_are_the_users(error: Exception, message: str) -> None:
    assert message in user_message(error) and bool(message) == bool(user_message(error))


def test_a_fault_of_the_program_has_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(lib.__main__, "dispatch", fault)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_bench_is_an_alias_of_the_evidence_package(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    evidence = importlib.import_module("data.evidence.__main__")
    monkeypatch.setattr(evidence, "main", lambda argv: calls.append(argv) or 3)
    assert main(["bench", "quick", "--json", "new/bench.json"]) == 3
    assert main(["slides", "--out", "new"]) == 3
    assert calls == [["quick", "--json", "new/bench.json"], ["slides", "--out", "new"]]


def test_mistakes_in_the_evidence_package_are_one_line(
        place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evidence = importlib.import_module("data.evidence.__main__")
    for words in (["slides", "--out", str(place / "good.jsonl" / "x")],
                  ["dtypes", "--json", str(place)]):
        assert evidence.main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["run", "-h"]])
def test_help(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "usage: python -m lib" in capfd.readouterr().out


def test_real_ctrl_c_in_training_and_the_next_run(
        place: Path, tiny_directory: str, capfd: pytest.CaptureFixture[str]) -> None:
    """SIGINT after a step: 130 and one line, no artifact; then the command works."""
    options = ("--mode", "lora", "--rank", "2", "--batch-size", "2")
    process = subprocess.Popen(
        [sys.executable, "-m", "lib", *training(tiny_directory, *options, "--steps", "100000")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell that runs the tests in the background makes them ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.stdout and any(line.startswith("step ") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.count("\n") == 1 and err.startswith("stopped")
    assert not (place / "out").exists()
    assert main(training(tiny_directory, *options, "--steps", "2")) == 0
    assert capfd.readouterr().err == ""
    assert verified(place / "out")["settings"]["steps"] == 2
    assert not list(place.glob(".out*"))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux has it")
def test_cores_taken_away_do_not_count() -> None:
    """llama.cpp with more threads than cores is ten times slower."""
    mine = min(os.sched_getaffinity(0))
    code = (f"import os; from lib.host import cores; os.sched_setaffinity(0, {{{mine}}}); "
            "print(cores())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize(("text", "count"), [
    ("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("max 100000", 8)])
def test_a_containers_quota_counts(monkeypatch: pytest.MonkeyPatch, text: str, count: int) -> None:
    """`docker run --cpus=2` leaves all cores in sight, and gives the time of two."""
    monkeypatch.setattr(Path, "read_text", lambda path, **_: f"{text}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cores() == count


def test_processes_of_one_training_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_count() == 1 and is_main_process() and not is_sharded()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert process_count() == 2 and not is_main_process() and is_sharded()
