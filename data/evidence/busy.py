"""A training step beside another busy program: how much of its speed is left.

Threads of OpenMP that have nothing to do wait in a loop first. The longer they do, the more a busy
machine loses; `lib` sets GOMP_SPINCOUNT, which says how long. OpenMP reads it once, when torch is
imported, so each measurement is a process of its own, and one that imports torch before `lib` has
torch's default.
"""

import itertools
import os
import subprocess
import sys
from typing import Any

from data.evidence.bench import median_and_range
from lib.files import ROOT

REPEATS = 2
FIRST = {"ours": "import lib\n", "as torch comes": "import torch\n"}
BUSY = "import torch; torch.set_num_threads(2); a = torch.ones(1500, 1500)\nwhile True: a @ a"
STEPS = ("from data.evidence.bench_training import OURS, time_arm\n"
         "from lib.settings import TrainSettings\n"
         "print(time_arm(OURS, TrainSettings(mode='lora', steps=3))[2])")


def untouched() -> dict[str, str]:
    """The environment without what `lib` has set in this process."""
    return {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}


def step_seconds(first: str) -> float:
    """Seconds of a training step, in a fresh process."""
    done = subprocess.run([sys.executable, "-c", first + STEPS], cwd=ROOT, check=True, text=True,
                          env=untouched(), stdout=subprocess.PIPE)
    return float(done.stdout.split()[-1])


def busy() -> dict[str, Any]:
    """Seconds of a step, quiet and beside a program of two threads, in turn; their ratio."""
    rows: dict[str, dict[str, list[float]]] = {
        name: {"quiet_s": [], "busy_s": [], "ratio": []} for name in FIRST}
    for _, (name, first) in itertools.product(range(REPEATS), FIRST.items()):
        quiet = step_seconds(first)
        with subprocess.Popen([sys.executable, "-c", BUSY], env=untouched()) as other:
            try:
                loaded = step_seconds(first)
            finally:
                other.kill()
        for key, value in zip(rows[name], (quiet, loaded, loaded / quiet), strict=True):
            rows[name][key].append(value)
        print(f"  {name}: {quiet:.2f} s quiet, {loaded:.2f} s busy", flush=True)
    return {name: median_and_range(row) for name, row in rows.items()}
