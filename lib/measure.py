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
from torch import Tensor

from lib.artifacts import BUILD, versions, write_json
from lib.base_model import machine
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


def paired_interval(differences: Tensor, *, draws: int = 10_000, seed: int = 0
                    ) -> tuple[float, float, float]:
    """Mean of paired differences, and its 95 % interval by a bootstrap of every axis.

    Seeds, plans and examples are crossed: each draw takes each axis's entries
    anew, with replacement, independently of the other axes (the pigeonhole
    bootstrap, Owen 2007), so whatever is shared along an axis is drawn together.

    Args:
        differences: one axis for each thing drawn, such as (seeds, plans, examples).

    Returns:
        (mean, low, high).
    """
    rng, shares = torch.Generator().manual_seed(seed), []
    for count in differences.shape:
        drawn = torch.randint(count, (draws, count), generator=rng)
        shares.append(torch.zeros(draws, count, dtype=torch.float64).scatter_add_(
            1, drawn, torch.full(drawn.shape, 1 / count, dtype=torch.float64)))
    found = torch.tensordot(shares[0], differences.double(), 1)
    for share in shares[1:]:
        found = torch.einsum("ds...,ds->d...", found, share)
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(differences.double().mean()), low, high


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
