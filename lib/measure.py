"""What a notebook measured, as JSON that tables and plots read later."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
