"""The command line: every mistake gets one line and status 2, and leaves nothing behind."""

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

import lib.measure
import lib.train
from lib.__main__ import main
from lib.artifacts import verified

pytestmark = pytest.mark.usefixtures("float32")

GOOD = b'{"instruction": "Unit %d?", "response": "It is %d."}\n'
DATA = {
    "good.jsonl": b"".join(GOOD % (i, i) for i in range(6)),
    "text.jsonl": b"Once upon a time\n",
    "cut.jsonl": GOOD % (1, 1) + b'{"instruction": "a", "respon',
    "keyless.jsonl": GOOD % (1, 1) + b'{"instruction": "a"}\n',
    "hollow.jsonl": b'{"instruction": "a", "response": ""}\n',
    "empty.jsonl": b"",
    "latin.jsonl": b'{"instruction": "caf\xe9", "response": "b"}\n',
    "taken": b"a file where a folder is wanted",
}
TRAIN = ["train", "--data", "good.jsonl", "--out", "out", "--model", "TINY"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with data, some of it bad; builds go there, too."""
    for name, content in DATA.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSE_PROFILE", "smoke")
    monkeypatch.setattr(lib.measure, "BUILD", tmp_path / "build")
    return tmp_path


def listing(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory: files with their bytes, folders."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() if p.is_file() else None
            for p in sorted(directory.rglob("*"))}


EXPORT = ["export", "--model", "TINY", "--out", "edge"]
# Arguments, and a part of the line that is expected: what is wrong, what to do.
MISTAKES: dict[str, tuple[list[str], str]] = {
    "no command": ([], "command"),
    "unknown command": (["fly"], "'fly'"),
    "unknown option": ([*TRAIN, "--speed", "9"], "--speed"),
    "unknown profile": (["run", "--profile", "huge"],
                        "unknown profile 'huge': use one of smoke, laptop"),
    "unknown notebook": (["run", "--only", "99"], "no notebook '99': use one of 01, "),
    "notebook no number": (["run", "--only", "lora"], "no notebook 'lora'"),
    "unknown bench": (["bench", "nothing"], "unknown benchmark 'nothing': use one of training"),
    "no bench": (["bench"], "name"),
    "no data": (["train", "--out", "out"], "--data"),
    "no out": (["train", "--data", "good.jsonl"], "--out"),
    "missing data": (["train", "--data", "none.jsonl", "--out", "out"],
                     "none.jsonl does not exist"),
    "data is a folder": (["train", "--data", "folder", "--out", "out"], "folder"),
    "no JSON": (["train", "--data", "text.jsonl", "--out", "out"],
                "text.jsonl:1 is no JSON"),
    "cut JSON": (["train", "--data", "cut.jsonl", "--out", "out"], "cut.jsonl:2 is no JSON"),
    "missing key": (["train", "--data", "keyless.jsonl", "--out", "out"],
                    "keyless.jsonl:2 lacks the text 'response'"),
    "empty response": (["train", "--data", "hollow.jsonl", "--out", "out"],
                       "hollow.jsonl:1 has an empty 'response'"),
    "empty data": (["train", "--data", "empty.jsonl", "--out", "out"],
                   "empty.jsonl has no records"),
    "not UTF-8": (["train", "--data", "latin.jsonl", "--out", "out"], "UTF-8"),
    "rank 0": ([*TRAIN, "--rank", "0"], "rank 0: use a positive"),
    "rank -1": ([*TRAIN, "--rank", "-1"], "rank -1: use a positive"),
    "rank too large": ([*TRAIN, "--rank", "999"], "rank 999 is above the width"),
    "rank no number": ([*TRAIN, "--rank", "many"], "'many'"),
    "unknown target": ([*TRAIN, "--targets", "q_proj,nose"],
                       "target module 'nose' does not exist here: use "),
    "tied target": ([*TRAIN, "--targets", "lm_head"], "target module 'lm_head'"),
    "unknown mode": ([*TRAIN, "--mode", "magic"], "'magic'"),
    "negative steps": ([*TRAIN, "--steps", "-5"], "steps -5"),
    "zero steps": ([*TRAIN, "--steps", "0"], "steps 0"),
    "zero learning rate": ([*TRAIN, "--learning-rate", "0"], "learning rate 0"),
    "no learning rate": ([*TRAIN, "--learning-rate", "nan"], "learning rate nan"),
    "endless learning rate": ([*TRAIN, "--learning-rate", "inf"], "learning rate inf"),
    "zero batch": ([*TRAIN, "--batch-size", "0"], "batch size 0"),
    "dropout of all": ([*TRAIN, "--dropout", "1"], "dropout 1"),
    "negative alpha": ([*TRAIN, "--alpha", "-1"], "alpha -1"),
    "negative warmup": ([*TRAIN, "--warmup", "-1"], "warmup -1"),
    "no length": ([*TRAIN, "--max-length", "0"], "max length 0"),
    "length too short": ([*TRAIN, "--max-length", "4"], "max-length"),
    "negative seed": ([*TRAIN, "--seed", "-1"], "seed -1"),
    "unknown model": ([*TRAIN[:-1], "nobody/nothing"], "'nobody/nothing'"),
    "model is a file": ([*TRAIN[:-1], "taken"], "'taken'"),
    "model is another folder": ([*TRAIN[:-1], "folder"], "folder does not load"),
    "out is a file": ([*TRAIN, "--out", "taken"], "taken is a file"),
    "out is below a file": ([*TRAIN, "--out", "taken/out"], "taken"),
    "out is in use": ([*TRAIN, "--out", "folder"], "folder"),
    "out is here": ([*TRAIN, "--out", "."], ""),
    "export without out": (["export"], "--out"),
    "export of no name": ([*EXPORT, "--adapter", "x"], "--adapter 'x' is not NAME=DIR"),
    "export of no adapter": ([*EXPORT, "--adapter", "x=none"], "none is no artifact"),
    "merge of no adapter": ([*EXPORT, "--merge", "folder"], "folder is no artifact"),
    "both": ([*EXPORT, "--merge", "folder", "--adapter", "x=folder"], "fold one in"),
    "unknown type": ([*EXPORT, "--type", "Q3_K"], "unknown tensor type 'Q3_K': use one of F32"),
    "unknown route": ([*EXPORT, "--route", "scenic"], "unknown route 'scenic'"),
    "export into use": (["export", "--model", "TINY", "--out", "folder"], "folder holds"),
    "serve nothing": (["serve", "nothing"], "nothing does not exist"),
    "serve a folder": (["serve", "folder"], "folder is no artifact"),
    "serve a text": (["serve", "good.jsonl"], "good.jsonl is no whole GGUF file"),
    "serve without slots": (["serve", "folder", "--slots", "0"], "0 slots serve nobody"),
    "serve at no port": (["serve", "folder", "--port", "70000"], "port 70000"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name: str, place: Path, tiny_directory: str,
                 capfd: pytest.CaptureFixture[str]) -> None:
    arguments, expected = MISTAKES[name]
    if "train" in arguments:
        # Two steps: a mistake that is not noticed must not cost minutes.
        arguments = ["train", "--steps", "2", *arguments[1:]]
    arguments = [tiny_directory if a == "TINY" else a for a in arguments]
    before = listing(place)
    capfd.readouterr()
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert expected in err
    assert out == "" and "Traceback" not in err
    assert listing(place) == before


@pytest.mark.parametrize(("variable", "value", "arguments", "expected"), [
    ("COURSE_PROFILE", "huge", ["run"], "unknown profile 'huge'"),
    ("COURSE_DTYPE", "float16", TRAIN, "error: COURSE_DTYPE=float16: use float32"),
])
def test_mistake_in_the_environment(
    variable: str, value: str, arguments: list[str], expected: str, place: Path,
    tiny_directory: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from lib.base_model import best_dtype

    monkeypatch.setenv(variable, value)
    best_dtype.cache_clear()
    before = listing(place)
    assert main([tiny_directory if a == "TINY" else a for a in arguments]) == 2
    err = capfd.readouterr().err
    assert expected in err and err.count("\n") == 1
    assert listing(place) == before


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
    """The table above fails for its reasons: without them the command works."""
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
    new = {p.name for p in place.iterdir()} - {*DATA, "folder"}
    assert new == {"out"}


def test_ctrl_c(place: Path, monkeypatch: pytest.MonkeyPatch,
                capfd: pytest.CaptureFixture[str]) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lib.train, "train", stop)
    assert main(["train", "--data", "good.jsonl", "--out", "out"]) == 130
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "run the same command again" in err


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
    monkeypatch.setattr("lib.bench.BENCHES", ("quick",))
    return ran


def test_bench_prints_and_keeps(place: Path, fake_bench: list[str],
                                capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quick", "--json", "new/bench.json"]) == 0
    assert "ratio" in (out := capfd.readouterr().out) and "1.5" in out
    stored = json.loads((place / "new" / "bench.json").read_text())
    assert stored == {"ratio": 1.5, "machine": {"cores": 2}}
    assert fake_bench == ["quick"]


@pytest.mark.parametrize("target", ["folder", "taken/bench.json"])
def test_bench_result_that_cannot_be_kept(place: Path, fake_bench: list[str], target: str,
                                          capfd: pytest.CaptureFixture[str]) -> None:
    before = listing(place)
    assert main(["bench", "quick", "--json", target]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert listing(place) == before


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


def test_mistakes_as_real_commands(start: Start, place: Path) -> None:
    """All at once, as each spends seconds on imports."""
    before = listing(place)
    commands = [MISTAKES[name][0] for name in ("unknown command", "unknown profile")]
    for command, process in [(c, start(*c)) for c in commands]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 2, command
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, (command, err)
    assert listing(place) == before


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
