"""The training step against the stock one, and with each set of target modules."""

import itertools
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

from transformers import TrainerCallback

from data.evidence.bench import median_and_range
from lib.base.embedded import quiet
from lib.base.model import load_model, load_tokenizer
from lib.base.records import sensors
from lib.files import scratch
from lib.settings import TARGETS, TrainSettings, seed_everything
from lib.train.training import make_trainer, run_trainer

STEPS, REPEATS = 6, 3


class StepClock(TrainerCallback):
    """Seconds of each optimizer step, data loading included."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.marks.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Step times; the first, which warms up, is left out."""
        return [b - a for a, b in itertools.pairwise(self.marks)]


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: where its attention and its step come from."""

    plain: bool
    attention: str


STOCK = Arm(plain=True, attention="sdpa")
EAGER = Arm(plain=True, attention="eager")
OURS = Arm(plain=False, attention="eager")


def time_arm(arm: Arm, settings: TrainSettings) -> tuple[float, float]:
    """(tokens per second, mean loss) of a few steps; tokens without padding."""
    seed_everything(settings.seed)
    tokenizer = load_tokenizer()
    records = sensors("train", settings.steps * settings.batch_size)
    model = load_model(attn_implementation=arm.attention)
    with scratch() as work:
        trainer = make_trainer(model, tokenizer, records, replace(settings, plain=arm.plain),
                               work=work)
        # Both sides see the same examples in the same batches.
        trainer.args.train_sampling_strategy = "sequential"
        trainer.args.save_strategy = "no"
        clock = StepClock()
        trainer.add_callback(clock)
        result = run_trainer(trainer, replace(settings, plain=arm.plain))
        tokens = sum(map(len, trainer.train_dataset["input_ids"])) / settings.steps
    return tokens / statistics.median(clock.seconds), statistics.mean(result.losses)


def training() -> dict[str, Any]:
    """Tokens per second of our training step against the stock SFTTrainer, in turn."""
    quiet()
    arms = {"plain": STOCK, "plain_eager": EAGER, "ours": OURS}
    sets = {"": "aggressive", "_attention": "standard"}
    runs: dict[str, list[tuple[float, float]]] = {}
    for _ in range(REPEATS):
        for suffix, targets in sets.items():
            for name, arm in arms.items():
                runs.setdefault(name + suffix, []).append(
                    time_arm(arm, TrainSettings(targets=targets, steps=STEPS)))
    speed = {name: [tokens for tokens, _ in pairs] for name, pairs in runs.items()}
    loss = {name: statistics.mean(loss for _, loss in pairs) for name, pairs in runs.items()}
    result: dict[str, Any] = {"repeats": REPEATS, "steps": STEPS}
    ratios = {}
    for suffix in sets:
        result |= {f"{name}_tokens_per_s{suffix}": statistics.median(speed[name + suffix])
                   for name in arms}
        ours, plain = f"ours{suffix}", f"plain{suffix}"
        ratios[f"ratio{suffix}"] = ours, plain
        result[f"loss_gap{suffix}"] = abs(loss[ours] - loss[plain]) / loss[plain]
    return result | median_and_range({
        name: [a / b for a, b in zip(speed[one], speed[other], strict=True)]
        for name, (one, other) in ratios.items()})


def targets() -> dict[str, Any]:
    """Time of a step with each target set over one with the smallest, on the same batches."""
    quiet()
    speed: dict[str, list[float]] = {name: [] for name in TARGETS}
    for _ in range(REPEATS):
        for name in TARGETS:
            speed[name].append(time_arm(OURS, TrainSettings(targets=name, steps=STEPS))[0])
    least, *others = TARGETS
    return {"repeats": REPEATS, "steps": STEPS, "tokens_per_s": speed} | median_and_range({
                f"{name}_step_ratio": [a / b for a, b in zip(
                    speed[least], speed[name], strict=True)] for name in others})
