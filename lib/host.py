"""The machine this process runs on: its cores, and the processes that share one training run."""

import contextlib
import os
from pathlib import Path


def cores() -> int:
    """The cores this process may use; one thread too many makes llama.cpp ten times slower."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent under macOS and Windows
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # not a container, or one without a limit
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split())
        count = min(count, max(1, quota // period))
    return count


def process_count() -> int:
    """The number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the one that writes files and prints."""
    return process_count() == 1 or os.environ.get("RANK") == "0"


def is_sharded() -> bool:
    """Whether FSDP splits the model, so that no process holds all of it."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
