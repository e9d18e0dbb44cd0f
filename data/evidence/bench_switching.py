"""What a change of configuration costs, and what the mixing network adds to a step."""

import functools
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from data.evidence.bench import median_and_range
from data.evidence.bench_training import StepClock
from lib.base.embedded import quiet
from lib.base.model import load_model
from lib.base.records import sensors
from lib.coa.adapter import CoaLora, train_over
from lib.coa.configuration import Configuration, Switchable, random_configuration
from lib.files import scratch
from lib.quantize.formats import Format, dequantize, pack_weight, quantize, unpack_weight
from lib.settings import TrainSettings, seed_everything
from lib.train.lora import lora_config

REPEATS, RUNS = 7, 4
STEP = TrainSettings(steps=8, warmup=0.0)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def switching() -> dict[str, Any]:
    """Times of switching among cached weights, of new ones, of materialising, of a step."""
    quiet()
    seed_everything(0)
    rng, base = random.Random(0), Switchable.load(cache_mb=1024)
    configurations = [random_configuration(base.layers, budget, rng) for budget in (3.0, 5.0)]
    unseen = [random_configuration(base.layers, 4.0, rng) for _ in range(REPEATS)]
    fresh = [_seconds(functools.partial(base.switch, configuration)) for configuration in unseen]
    for configuration in configurations:
        base.switch(configuration)
    cached = [_seconds(functools.partial(base.switch, configuration))
              for configuration in configurations * 20]
    coa = CoaLora(get_peft_model(base.model, lora_config(base.model, STEP)), base)
    rows: dict[str, list[float]] = {
        "cached_switch_ms": [1e3 * s for s in cached], "new_configuration_s": fresh}
    with scratch() as folder:
        rows["materialise_s"] = [
            _seconds(functools.partial(coa.materialise, configuration, folder / "materialised"))
            for configuration in unseen]
        coa.write(folder / "plain")
        rows["latency_overhead"] = _latency(folder, unseen[-1])
        rows["packed_over_plain"] = _packed(configurations[0])
    rows["step_ratio"] = _step_ratios(configurations)
    theta = sum(p.numel() for p in coa.network.parameters())
    return {"theta_parameters": theta} | median_and_range(rows)


@torch.inference_mode()
def _latency(folder: Path, configuration: Configuration) -> list[float]:
    """Forward passes of one token: materialised adapter over plain adapter, less one.

    The two take turns, and the median of 20 passes counts: other programs
    disturb any single one.
    """
    base = Switchable.load()
    base.switch(configuration)
    model = PeftModel.from_pretrained(base.model, str(folder / "plain"), "plain")
    model.load_adapter(str(folder / "materialised"), "materialised")
    step = functools.partial(model, input_ids=torch.tensor([[5]]))

    def ratio() -> float:
        taken: dict[str, list[float]] = {"materialised": [], "plain": []}
        for turn in range(20):
            for name in sorted(taken, reverse=bool(turn % 2)):
                model.set_adapter(name)
                step()
                taken[name].append(_seconds(step))
        return statistics.median(taken["materialised"]) / statistics.median(taken["plain"])

    return [ratio() - 1 for _ in range(REPEATS)]


class Packed(torch.nn.Module):
    """A linear layer without a bias that decodes its packed weights in each call."""

    def __init__(self, parts: dict[str, torch.Tensor], fmt: Format, plain: torch.nn.Linear
                 ) -> None:
        super().__init__()
        self.parts, self.format, self.shape = parts, fmt, plain.weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = dequantize(unpack_weight(self.parts, self.format, self.shape.numel()))
        return torch.nn.functional.linear(x, weight.view(self.shape).to(x))


@torch.inference_mode()
def _packed(configuration: Configuration) -> list[float]:
    """A token's forward pass from packed weights over one from plain weights."""
    base, other = Switchable.load(), load_model()
    base.switch(configuration)
    for i, (name, fmt) in enumerate(
            zip(base.layers.names, configuration.formats, strict=True)):
        parts = pack_weight(quantize(base.weight(i), fmt))
        other.set_submodule(name, Packed(parts, fmt, other.get_submodule(name)))
    ids = torch.tensor([[5]])
    return [_seconds(lambda: other(input_ids=ids))
            / _seconds(lambda: base.model(input_ids=ids)) for _ in range(REPEATS)]


def _step_ratios(configurations: list[Configuration]) -> list[float]:
    """For each step, seconds of CoA-LoRA over those of Shared-LoRA.

    A step has the same examples in every run. Other programs can only add
    time, and for longer than a step. So the runs take turns, and the shortest
    time of each step counts.
    """
    taken: dict[str, list[list[float]]] = {"coa": [], "shared": []}
    for turn in range(RUNS):
        for method in sorted(taken, reverse=bool(turn % 2)):
            taken[method].append(_steps(method, configurations))
    ours, plain = ([min(times) for times in zip(*runs, strict=True)] for runs in taken.values())
    return [a / b for a, b in zip(ours, plain, strict=True)]


def _steps(method: str, configurations: list[Configuration]) -> list[float]:
    """Seconds of each training step, among cached configurations."""
    base, clock = Switchable.load(), StepClock()
    for configuration in configurations:
        base.switch(configuration)
    train_over(base, sensors("train", STEP.steps * STEP.batch_size), configurations, STEP,
               method=method, callbacks=[clock])
    return clock.seconds
