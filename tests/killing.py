"""Writers that test_crash.py kills: `python tests/killing.py NAME PLACE AT [MODEL]`.

A writer dies just before its AT-th call that touches PLACE, so the moment is the same on
every machine. With AT 0 it runs to its end and prints how many such calls it made.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from lib.files import writing

EVENTS = ("open", "os.rename", "os.mkdir", "os.chmod")
# These name a path only relative to a folder that is open.
REMOVALS = ("os.remove", "os.rmdir")


def artifact(place: Path) -> None:
    with writing(place / "out", seed=7) as part:
        (part / "weights").write_bytes(bytes(100_000))
        with writing(part / "adapter") as inner:
            (inner / "config.json").write_text("{}")


def training(place: Path, model: str) -> None:
    import lib.train.training
    from lib.settings import TrainSettings

    lib.train.training.CHECKPOINT_EVERY = 2
    settings = TrainSettings(steps=6, batch_size=2, rank=2, learning_rate=2e-2, dropout=0.1)
    records = [{"instruction": f"Unit {i}?", "response": f"It is {i}."} for i in range(6)]
    lib.train.training.train(records, settings, model=model, out=place / "out")


def main(name: str, place: Path, at: int, *model: str) -> None:
    calls = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        if event in REMOVALS or (event in EVENTS and str(arguments[0]).startswith(str(place))):
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    {"artifact": artifact, "training": training}[name](place, *model)
    print(calls)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
