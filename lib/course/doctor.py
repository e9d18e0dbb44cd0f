"""What this machine has for the course, one line for each thing.

It needs only the standard library, since it runs where packages are missing.
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lib.base.embedded import MODEL_CACHE, WHEEL, WHEEL_FILE
from lib.files import BUILD, ROOT
from lib.host import cores

MEMORY_GB, DISK_GB = 4.2, 2.2  # the largest notebook; base model, its wheel, one laptop run


@dataclass(frozen=True)
class Finding:
    """One line; `state` is ok, note (it works) or problem (`text` ends with the remedy)."""

    name: str
    state: str
    text: str

    def __str__(self) -> str:
        return f"{self.state:8} {self.name:10} {self.text}"


def examine() -> Iterator[Finding]:
    """Make every check in turn. Nothing is changed or downloaded."""
    newer = sys.version_info[:2] > (3, 13)  # lib/__init__.py refuses an older one than 3.11
    yield Finding("python", "note" if newer else "ok",
                  platform.python_version() + ": the course was tried with 3.11 to 3.13" * newer)
    for check in (packages, memory, disk, base_model, processor):
        yield Finding(check.__name__.replace("_", " "), *check())


def packages() -> tuple[str, str]:
    """Installed versions beside the pinned ones; the last number may differ."""
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pins, wrong = re.findall(r"(?m)^([\w.-]+)==([\w.]+)", requirements), []
    for name, pinned in pins:
        try:
            installed = importlib.metadata.version(name)
            if installed.split(".")[:2] != pinned.split(".")[:2]:
                wrong.append(f"{name} {installed} instead of {pinned}")
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
    if not wrong:
        return "ok", f"all {len(pins)} pinned packages are installed"
    more = f" and {len(wrong) - 3} more" * (len(wrong) > 3)
    return "problem", (f"{', '.join(wrong[:3])}{more}: run `python -m pip install -r "
                       "requirements.txt` in a fresh environment")


def memory() -> tuple[str, str]:
    """Total memory, or a container's limit, beside what the largest notebook takes."""
    try:
        import psutil
    except ModuleNotFoundError:
        return "note", "not measured, because psutil is missing"
    total, free = psutil.virtual_memory()[:2]
    with contextlib.suppress(OSError, ValueError):  # not a container, or one without a limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    text = f"{total / 1e9:.1f} GB, {min(total, free) / 1e9:.1f} free; needed {MEMORY_GB}"
    if total < MEMORY_GB * 1e9:
        return "problem", f"{text}: use a larger machine, or `run --only` the notebooks that fit"
    return ("note", f"{text}: close other programs") if free < MEMORY_GB * 1e9 else ("ok", text)


def disk() -> tuple[str, str]:
    """Free space where build/ is or will be; a finished run need not fit again."""
    folder = next(p for p in (BUILD.absolute(), *BUILD.absolute().parents) if p.is_dir())
    if not os.access(folder, os.W_OK):
        return "problem", f"{folder} cannot be written: name another folder in COURSE_BUILD"
    free = shutil.disk_usage(folder).free / 1e9
    text = f"{free:.1f} GB free at {BUILD}; needed {DISK_GB}"
    small = free < DISK_GB and not (BUILD / "course").exists()
    return ("problem", f"{text}: make room") if small else ("ok", text)


def base_model() -> tuple[str, str]:
    """Whether the embedded model is here, or is still to be downloaded."""
    if (MODEL_CACHE / "manifest.json").is_file() or WHEEL_FILE.is_file():
        return "ok", "at hand"
    if os.environ.get("COURSE_WHEEL"):
        return "problem", f"COURSE_WHEEL={WHEEL_FILE} does not exist: check the path"
    return "note", f"not here yet: the first run downloads {WHEEL} (93 MB)"


def processor() -> tuple[str, str]:
    """Cores, the faster dtype, which is measured, and what to expect (START has more times)."""
    text = f"{platform.machine()}, {cores()} core{'s' * (cores() > 1)}"
    try:
        from lib.base.model import best_dtype
    except ModuleNotFoundError as error:
        return "note", f"{text}; dtype not measured, because {error.name} is missing"
    dtype = str(best_dtype()).removeprefix("torch.")
    return "ok", f"{text}, computes in {dtype} (measured): `run` takes 15 to 35 minutes on 2 cores"
