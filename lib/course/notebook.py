"""What all notebooks share: their opening, the figures they keep, the checks of exercises."""

import copy
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib.base.model import machine
from lib.evaluate.scores import use_style
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
        self.rows = [row for row in self.rows if row["name"] != name]
        self.rows.append({"name": name, "value": value, "unit": unit,
                          "seed": self.profile.train.seed, "profile": self.profile.name})
        write_json(run_directory(self.profile.name) / f"{self.notebook}.json", {
            "notebook": self.notebook, "profile": asdict(self.profile),
            "versions": versions(), "machine": machine(), "measured": self.rows})


def start(number: str, profile: str, model: str = "") -> tuple[Profile, Measurements]:
    """Set the style of figures and the seed; print what the numbers of this run depend on."""
    use_style()
    chosen = get_profile(profile, model)
    print(f"profile: {chosen.name} | model: {chosen.model} | dtype: {machine()['dtype']}")
    print(textwrap.fill(", ".join(f"{name} {number}" for name, number in versions().items()), 79))
    seed_everything(chosen.train.seed)
    return chosen, Measurements(number, chosen)


def check(attempt: Callable[..., Any], cases: Sequence[tuple[Any, Any]],
          tolerance: float = 1e-6) -> None:
    """Print `right: N cases`, or `not attempted yet` after a NotImplementedError.
    `cases` are pairs (arguments, expected); an `expected` that is a function takes the answer
    and says what is wrong with it, or "". AssertionError, in one line, for a wrong answer."""
    for arguments, expected in cases:
        try:
            answer = attempt(*copy.deepcopy(arguments))
        except NotImplementedError as error:
            return print("not attempted yet", *error.args)
        wrong = "yours None: is the return missing?"
        if answer is not None:
            wrong = expected(answer) if callable(expected) else differs(answer, expected, tolerance)
        if wrong:
            raise AssertionError(f"{attempt.__name__}{_shown(tuple(arguments))}: {wrong}")
    print(f"right: {len(cases)} case{'s' * (len(cases) > 1)}")


def differs(yours: Any, expected: Any, tolerance: float = 1e-6) -> str:
    """How two values differ, in one line; "" if they are equal, floats within the tolerance."""
    both = f"yours {_shown(yours)}, expected {_shown(expected)}"
    if isinstance(expected, list | tuple) and isinstance(yours, list | tuple):
        yours, expected = ({f"part {i}": x for i, x in enumerate(v)} for v in (yours, expected))
    if isinstance(expected, dict) and isinstance(yours, dict) and yours.keys() == expected.keys():
        parts = ((name, differs(yours[name], expected[name], tolerance)) for name in expected)
        return next((f"{name}: {wrong}" for name, wrong in parts if wrong), "")
    if any(isinstance(x, str | bytes | dict) for x in (yours, expected)):
        return "" if yours == expected else both
    left, right = (torch.as_tensor(x if isinstance(x, torch.Tensor) else np.array(x)).detach()
                   for x in (yours, expected))
    floats = right.is_floating_point()
    if left.shape != right.shape or (left.dim() and left.is_floating_point() != floats):
        return f"{both} ({left.dtype} and {right.dtype})".replace("torch.", "")
    left, right, limit = left.double(), right.double(), tolerance * floats
    if torch.allclose(left, right, limit, limit):
        return ""
    return both + f"; largest difference {(left - right).abs().max():.3g}" * (left.numel() > 12)


def _shown(value: Any) -> str:
    """A value on one line; for a large tensor its dtype and shape."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        if np.prod(value.shape) > 12:
            return f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")
        value = value.tolist()
    if isinstance(value, list | tuple):
        text = ", ".join(map(_shown, value))
        return f"[{text}]" if isinstance(value, list) else f"({text})"
    text = " ".join((f"{value:.8g}" if isinstance(value, float) else repr(value)).split())
    return text if len(text) <= 120 else f"{text[:117]}..."
