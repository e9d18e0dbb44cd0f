"""What this machine has for the course, a line for each thing, and what to expect of it.

Needs the standard library alone: it is what one runs when a package is missing.
"""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from os import cpu_count, environ
from pathlib import Path

from lib.artifacts import BUILD, ROOT, read_json
from lib.embedded import WHEEL, model_cache, wheel_file

NEWEST = (3, 13)  # the oldest stands in lib/__init__.py; the pins have wheels for both
# Model and wheel 366 MB, a finished laptop run 1,816 MB (du -sb build/models build/course/laptop).
DISK_MB = 2200
FEATURES = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16",
            "amx_bf16": "AMX", "asimd": "NEON", "bf16": "bf16"}
PIP = "python -m pip install -r requirements.txt"


@dataclass(frozen=True)
class Finding:
    """One line: `state` is ok, note (it works, but know this) or problem (with its remedy)."""

    name: str
    state: str
    said: str

    def __str__(self) -> str:
        return f"{self.state:8} {self.name:9} {self.said}"


def examine() -> Iterator[Finding]:
    """Every check in turn. Nothing is changed, nothing is fetched."""
    for check in (python, packages, memory, disk, processor, gpu, base_model, expect):
        yield Finding(check.__name__.replace("_", " "), *check())


def python() -> tuple[str, str]:
    """Version, word size and system, as the wheels of the pins want them (lib wants 3.11)."""
    system, machine = platform.system(), sysconfig.get_platform()
    said = f"{platform.python_version()} on {machine}"
    if sys.maxsize < 2**32:
        return "problem", f"{said}: the wheels need a 64-bit Python"
    if machine == "win-arm64":
        return "problem", f"{said}: torch has no wheel for it, use Linux in WSL"
    if system == "Darwin" and platform.machine() == "x86_64":
        return "problem", f"{said}: torch has no wheel for it; an Apple chip wants an arm64 Python"
    if system == "Darwin" and int(platform.mac_ver()[0].partition(".")[0] or 14) < 14:
        return "problem", f"{said}: the wheel of torch needs macOS 14 or newer"
    if sys.version_info[:2] > NEWEST:
        return "note", f"{said}: newer than {NEWEST[0]}.{NEWEST[1]}, not tried"
    return "ok", said


def packages() -> tuple[str, str]:
    """Installed versions beside the pinned ones; a last number may differ."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"(?m)^([\w.-]+)==([\w.]+)", text))
    missing, other, near = [], [], []
    for name, wanted in pins.items():
        try:
            found = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if found != wanted:
            close = found.split(".")[:2] == wanted.split(".")[:2]
            (near if close else other).append(f"{name} {found} (pinned {wanted})")
    if missing or other:
        lacking = f"missing: {few(missing)}; " if missing else ""
        wrong = f"other versions: {few(other)}; " if other else ""
        return "problem", f"{lacking}{wrong}run `{PIP}` in a fresh environment"
    return ("note" if near else "ok"), ", ".join(near) or f"all {len(pins)} pins are installed"


def few(names: list[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def course_files(folder: Path = ROOT / "notebooks") -> list[Path]:
    """The course's notebooks in order; a reader's copies beside them are not of it."""
    return sorted(p for p in folder.glob("[0-9][0-9]_*.ipynb")
                  if re.fullmatch(r"\d\d(_[a-z0-9]+)+", p.stem))


def stored_costs(folder: Path = ROOT / "notebooks") -> dict[str, dict[str, float]]:
    """{notebook: seconds and peak_mb} of the runs whose outputs are stored."""
    found = {p.stem: read_json(p)["metadata"].get("course") for p in course_files(folder)}
    return {name: cost for name, cost in found.items() if cost}


def memory() -> tuple[str, str]:
    """All of it (in a container, its limit) and what is free, beside the largest peak."""
    if not importlib.util.find_spec("psutil"):
        return "note", "not measured: psutil is missing"
    import psutil

    seen = psutil.virtual_memory()
    total = seen.total
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no container, or no limit in it
            total = min(total, int((Path("/sys/fs/cgroup") / file).read_text(encoding="utf-8")))
    free = min(total, seen.available)
    name, peak = max(((n, c["peak_mb"]) for n, c in stored_costs().items()), key=lambda x: x[1])
    said = f"{total / 1e9:.1f} GB, {free / 1e9:.1f} free; {name} takes {peak / 1e3:.1f}"
    if total < peak * 1e6:
        return "problem", f"{said}: use a larger machine, or `run --only` the notebooks that fit"
    if free < peak * 1e6:
        return "note", f"{said}: close other programs before that notebook"
    return "ok", said


def disk() -> tuple[str, str]:
    """A file can be written where build/ is or will be, and the rest of a run fits."""
    place = next(p for p in (BUILD.absolute(), *BUILD.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free / 1e6
    except OSError as error:
        return "problem", (f"{BUILD} cannot be written ({error.strerror}): "
                           "mend its rights, or name a folder in COURSE_BUILD")
    there = sum(f.stat().st_size for name in ("models", "course/laptop")
                for f in (BUILD / name).rglob("*") if f.is_file()) / 1e6
    needed = max(100, DISK_MB - there)
    said = f"{free / 1e3:.1f} GB free at {BUILD}, the course needs {needed / 1e3:.1f} more"
    return ("problem", f"{said}: make room") if free < needed else ("ok", said)


def instructions() -> set[str]:
    """What the processor can, by Linux's names; empty where the system does not say."""
    system, given = platform.system(), set()
    with contextlib.suppress(OSError, AttributeError, subprocess.SubprocessError):
        if system == "Linux":
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
            given = set(" ".join(re.findall(r"(?m)^(?:flags|Features)\s*:(.*)", text)).split())
        elif system == "Windows":
            has = ctypes.windll.kernel32.IsProcessorFeaturePresent
            given = {name for name, number in (("avx2", 40), ("avx512f", 41)) if has(number)}
        elif system == "Darwin":
            said = output("sysctl", "-n", "hw.optional.arm.FEAT_BF16")
            given = {"asimd"} | ({"bf16"} if said == "1" else set())
    return given & FEATURES.keys()


def output(*command: str, timeout: float = 10) -> str:
    """What a program prints, "" where it is missing, fails or hangs."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace",
                              timeout=timeout, check=True).stdout.strip()
    return ""


def cores() -> int:
    """How many this process may use: a container or `taskset` may have taken some away.

    A thread of llama.cpp too many waits for a core that it never gets: ten times slower.
    """
    given = getattr(os, "sched_getaffinity", None)  # neither under macOS nor under Windows
    count = len(given(0)) if given else cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit in it
        said = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8")
        quota, period = map(int, said.split())
        count = min(count, max(1, quota // period))
    return count


def processor() -> tuple[str, str]:
    """Cores, and the instructions on which the computing dtype depends."""
    count, given = cores(), instructions()
    listed = ", ".join(FEATURES[name] for name in FEATURES if name in given)
    said = f"{platform.machine()}, {count} core{'s' * (count > 1)}: {listed or 'not known'}"
    if count == 1:
        return "note", f"{said}; with one core all takes about twice as long"
    if "amx_bf16" in given:
        return "ok", said
    # Windows tells nothing about bfloat16, and having it does not make it the faster.
    if platform.system() == "Windows" or not given or given & {"avx512_bf16", "bf16"}:
        return "ok", f"{said}; bfloat16 or float32 is measured when a model is loaded"
    return "note", f"{said}; without bfloat16 all is computed in float32, which takes longer"


def gpu() -> tuple[str, str]:
    """An NVIDIA GPU, and whether the installed torch can use it. None is needed."""
    named = output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    if not named:
        return "ok", "none, and none is needed"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if importlib.metadata.version("torch").endswith("+cpu"):
            return "note", f"{named}; unused, because torch is the build for CPUs"
    return "ok", "; ".join(named.splitlines())


def base_model() -> tuple[str, str]:
    """The embedded model: ready, at hand in its wheel, or to be fetched by pip."""
    cache, wheel = model_cache(), wheel_file()
    if (cache / "manifest.json").is_file():
        return "ok", f"ready in {cache}"
    if wheel.is_file():
        return "ok", f"at hand in {wheel}, written out on first use"
    if given := environ.get("COURSE_WHEEL"):
        return "problem", f"COURSE_WHEEL={given} does not exist: check the path"
    if not importlib.util.find_spec("pip"):
        return "problem", "not here, and no pip to fetch it: run `python -m ensurepip`"
    if output(sys.executable, "-m", "pip", "--timeout", "4", "--retries", "0", "index", "versions",
              WHEEL.partition("==")[0]):
        return "ok", f"not here yet: the first run fetches {WHEEL} (93 MB)"
    return "problem", (f"not here, and pip does not find {WHEEL}: connect to the network, "
                       "or set COURSE_WHEEL to the wheel")


def expect() -> tuple[str, str]:
    """Time and memory of the default profile, as they were measured."""
    costs = stored_costs().values()
    on = sorted({f"{c['cores']} cores computing in {c['dtype']}" for c in costs})
    return "ok", (f"profile laptop: {sum(c['seconds'] for c in costs) / 60:.0f} minutes and "
                  f"{max(c['peak_mb'] for c in costs) / 1e3:.1f} GB of memory, measured on "
                  + " and on ".join(on))
