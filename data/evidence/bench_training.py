"""The training step against the stock one, and with each set of target modules."""

import itertools
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from data.evidence.bench import median_and_range
from lib.base.embedded import quiet
from lib.base.model import best_dtype, load_model, load_tokenizer, pad_right
from lib.base.records import encode, sensors
from lib.evaluate.scores import answer_loss
from lib.files import scratch
from lib.settings import TARGETS, TrainSettings, seed_everything
from lib.train.lora import fused, lora_config
from lib.train.training import make_trainer, run_trainer

STEPS, REPEATS = 3, 3


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


def time_arm(arm: Arm, settings: TrainSettings) -> tuple[float, float, float]:
    """(tokens per second, mean loss, seconds of a step) of a few steps; tokens without padding."""
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
    seconds = statistics.median(clock.seconds)
    return tokens / seconds, statistics.mean(result.losses), seconds


def product_rate(rows: int) -> float:
    """The most floating-point operations a second of one of the model's matrix products."""
    rates = []
    for inputs, outputs in ((576, 576), (576, 1536), (1536, 576)):
        left = torch.randn(rows, inputs).to(best_dtype())
        right = torch.randn(inputs, outputs).to(best_dtype())
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            left @ right
            seconds.append(time.perf_counter() - start)
        rates.append(2 * rows * inputs * outputs / statistics.median(seconds))
    return max(rates)


def operations(settings: TrainSettings) -> tuple[float, int]:
    """(floating-point operations of our step by torch's count, rows of its products).

    The products of A and B into a sum are not in that count: it is a little low.
    """
    tokenizer, model = load_tokenizer(), load_model()
    adapted = get_peft_model(model, lora_config(model, settings)).train()
    pairs = [encode(tokenizer, record) for record in sensors("train", settings.batch_size)]
    ids, labels = pad_right(pairs, 0)
    with fused(adapted), FlopCounterMode(display=False) as counter:
        answer_loss(adapted, ids, labels)[0].backward()
    return counter.get_total_flops(), ids.numel()


def training() -> dict[str, Any]:
    """Tokens per second of our training step against the stock SFTTrainer, in turn."""
    quiet()
    arms = {"plain": STOCK, "plain_eager": EAGER, "ours": OURS}
    sets = {"": "aggressive", "_attention": "standard"}
    runs: dict[str, list[tuple[float, float, float]]] = {}
    shares: dict[str, list[float]] = {}
    work = {suffix: operations(TrainSettings(targets=name)) for suffix, name in sets.items()}
    for repeat in range(REPEATS):
        for suffix, targets in sets.items():
            for name, arm in arms.items():
                if name == "plain_eager" and repeat:
                    continue  # beside the others, once is enough
                runs.setdefault(name + suffix, []).append(
                    time_arm(arm, TrainSettings(targets=targets, steps=STEPS)))
            done, rows = work[suffix]
            seconds = runs[f"ours{suffix}"][-1][2]
            shares.setdefault(f"share{suffix}", []).append(done / seconds / product_rate(rows))
    speed = {name: [row[0] for row in rows] for name, rows in runs.items()}
    loss = {name: statistics.mean(row[1] for row in rows) for name, rows in runs.items()}
    result: dict[str, Any] = {"repeats": REPEATS, "steps": STEPS}
    ratios = {}
    for suffix in sets:
        result |= {f"{name}_tokens_per_s{suffix}": statistics.median(speed[name + suffix])
                   for name in arms}
        ours, plain = f"ours{suffix}", f"plain{suffix}"
        ratios[f"ratio{suffix}"] = ours, plain
        result[f"loss_gap{suffix}"] = abs(loss[ours] - loss[plain]) / loss[plain]
    return result | median_and_range(shares | {
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
