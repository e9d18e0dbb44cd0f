"""The opening that all notebooks share, and the figures that each of them keeps."""

import dataclasses
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.files import BUILD, versions, write_json
from lib.settings import Profile, get_profile, seed_everything


def run_directory(profile: str) -> Path:
    """Where a run of the course puts its files."""
    return BUILD / "course" / profile


@dataclass
class Measurements:
    """Figures of one notebook in build/course/PROFILE/NN.json, rewritten at every `add`."""

    notebook: str
    profile: Profile
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, value: float | int, unit: str = "") -> None:
        """Store a figure under a name; `unit` is as one would print it."""
        from lib.base.model import machine

        self.rows = [row for row in self.rows if row["name"] != name]
        self.rows.append({"name": name, "value": value, "unit": unit,
                          "seed": self.profile.train.seed, "profile": self.profile.name})
        write_json(run_directory(self.profile.name) / f"{self.notebook}.json", {
            "notebook": self.notebook, "profile": dataclasses.asdict(self.profile),
            "versions": versions(), "machine": machine(), "measured": self.rows})


def start(number: str, profile: str, model: str = "") -> tuple[Profile, Measurements]:
    """Set the style of figures and the seed; print what the numbers of this run depend on."""
    from lib.base.model import machine  # torch: `lib.course.run` needs only a folder's name
    from lib.evaluate.figures import use_style

    use_style()
    chosen = get_profile(profile, model)
    print(f"profile: {chosen.name} | model: {chosen.model} | dtype: {machine()['dtype']}")
    print(textwrap.fill(", ".join(f"{name} {number}" for name, number in versions().items()), 79))
    seed_everything(chosen.train.seed)
    return chosen, Measurements(number, chosen)
