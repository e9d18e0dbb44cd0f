"""What more target modules cost: a training step with each set, in turn."""

from typing import Any

from lib.artifacts import versions
from lib.base_model import machine, quiet
from lib.bench_training import OURS, REPEATS, STEPS, time_arm
from lib.measure import middle_and_spread
from lib.profiles import TARGETS, TrainSettings


def targets() -> dict[str, Any]:
    """Time of a step with each target set over one with the smallest, on the same batches."""
    quiet()
    speed: dict[str, list[float]] = {name: [] for name in TARGETS}
    for _ in range(REPEATS):
        for name in TARGETS:
            speed[name].append(time_arm(OURS, TrainSettings(targets=name, steps=STEPS))[0])
    least, *others = TARGETS
    return {"machine": machine(), "versions": versions(), "repeats": REPEATS, "steps": STEPS,
            "tokens_per_s": speed} | middle_and_spread({
                f"{name}_step_ratio": [a / b for a, b in zip(
                    speed[least], speed[name], strict=True)] for name in others})
