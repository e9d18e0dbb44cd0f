"""What was measured, as JSON that tables and plots read later; peak memory."""

import contextlib
import dataclasses
import os
import statistics
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from scipy.special import stdtrit
from torch import Tensor

from lib.artifacts import BUILD, versions, write_json
from lib.base_model import machine
from lib.errors import require
from lib.profiles import Profile


def run_directory(profile: str) -> Path:
    """Where a run of the course leaves what it made."""
    return BUILD / "course" / profile


@dataclass
class Measurements:
    """Figures of one notebook, kept in build/course/PROFILE/NN.json.

    The file is rewritten whole at every `add`, so a run that stops early
    leaves what it had measured.
    """

    notebook: str
    profile: Profile
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, value: float | int, unit: str = "") -> None:
        """Keep a figure under a name; `unit` is as one would print it."""
        self.rows = [r for r in self.rows if r["name"] != name]
        self.rows.append({"name": name, "value": value, "unit": unit,
                          "seed": self.profile.train.seed, "profile": self.profile.name})
        write_json(run_directory(self.profile.name) / f"{self.notebook}.json", {
            "notebook": self.notebook, "profile": dataclasses.asdict(self.profile),
            "versions": versions(), "machine": machine(), "measured": self.rows})


def middle_and_spread(rows: dict[str, list[float]]) -> dict[str, Any]:
    """Median of each row's repeats, and under NAME_spread the least and the largest."""
    return {key: statistics.median(values) for key, values in rows.items()} | {
        f"{key}_spread": [min(values), max(values)] for key, values in rows.items()}


def paired_interval(differences: Tensor) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % interval, for another draw of every axis.

    Seeds, plans and examples are crossed, and each axis adds to the variance of
    the mean: V = sum of v_a with v_a = s_a^2 / n_a, where s_a^2 is the sample variance
    of the n_a means along the axis (two-way clusters, Cameron, Gelbach, Miller 2011,
    without the term that they take off again, so rather too wide than too narrow).
    Half the width is Student's t sqrt(V) with V^2 / sum(v_a^2 / (n_a - 1)) degrees of
    freedom (Welch 1947). Where three seeds differ, a bootstrap of the axes holds the
    truth in about three of four cases (notebook 06). Where another axis adds a tenth or
    a fifth of what three seeds do, this one holds it in 92 to 93 % instead of 95.

    Args:
        differences: one axis for each thing drawn, such as (seeds, plans, examples).
            An axis of one entry adds nothing: the interval is then for that entry.

    Returns:
        (mean, low, high).

    Raises:
        UserError: a single difference, which has no interval.
    """
    values, spread, freedom = differences.double(), 0.0, 0.0
    require(values.numel() > 1, "one difference has no interval: give several")
    for axis, count in enumerate(values.shape):
        if count > 1:
            own = float(values.movedim(axis, 0).reshape(count, -1).mean(1).var()) / count
            spread, freedom = spread + own, freedom + own ** 2 / (count - 1)
    mean = float(values.mean())
    half = float(stdtrit(spread ** 2 / freedom, 0.975)) * spread ** 0.5 if freedom else 0.0
    return mean, mean - half, mean + half


@contextlib.contextmanager
def peak_memory(interval: float = 0.05, *, children: bool = False) -> Iterator[dict[str, float]]:
    """Peak memory in MB (10^6 bytes) of this process while the block runs.

    Resident memory on a CPU, sampled; allocated memory on a GPU, exact. With
    `children`, the resident memory of the processes that this one started.
    """
    peak, stop = {"mb": 0.0}, threading.Event()
    process = psutil.Process(os.getpid())

    def resident() -> float:
        total = 0
        for one in process.children(recursive=True) if children else [process]:
            with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
                total += one.memory_info().rss
        return total / 1e6

    def watch() -> None:
        while True:
            peak["mb"] = max(peak["mb"], resident())
            if stop.wait(interval):
                return

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        if torch.cuda.is_available() and not children:
            peak["mb"] = torch.cuda.max_memory_allocated() / 1e6
