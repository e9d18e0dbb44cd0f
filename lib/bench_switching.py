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

from lib.base_model import load_model, quiet
from lib.bench_training import StepClock
from lib.coa import CoaLora
from lib.configuration import Configuration
from lib.joint import train_over
from lib.lora import lora_config
from lib.measure import middle_and_spread
from lib.packing import load_packed, save_packed
from lib.plans import random_plan
from lib.profiles import TrainSettings, seed_everything
from lib.scratch import scratch
from lib.switchable import Switchable
from lib.tasks import sensors

REPEATS, RUNS = 7, 4
STEP = TrainSettings(steps=8, warmup=0.0)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def switching() -> dict[str, Any]:
    """Switch among kept levels, build new ones, materialise; latency; training step."""
    quiet()
    seed_everything(0)
    rng, base = random.Random(0), Switchable.load(cache_mb=1024)
    plans = [random_plan(base.layers, budget, rng) for budget in (3.0, 5.0)]
    unseen = [random_plan(base.layers, 4.0, rng) for _ in range(REPEATS)]
    fresh = [_seconds(functools.partial(base.switch, plan)) for plan in unseen]
    for plan in plans:
        base.switch(plan)
    kept = [_seconds(functools.partial(base.switch, plan)) for plan in plans * 20]
    coa = CoaLora(get_peft_model(base.model, lora_config(base.model, STEP)), base)
    rows: dict[str, list[float]] = {
        "cached_switch_ms": [1e3 * s for s in kept], "new_configuration_s": fresh}
    with scratch() as place:
        rows["materialise_s"] = [
            _seconds(functools.partial(coa.materialise, plan, place / "plan"))
            for plan in unseen]
        coa.save_pretrained(place / "plain")
        rows["latency_overhead"] = _latency(place, unseen[-1])
        rows["packed_over_plain"] = _packed(place, plans[0])
    rows["step_ratio"] = _step_ratios(plans)
    theta = sum(p.numel() for p in coa.network.parameters())
    return {"theta_parameters": theta} | middle_and_spread(rows)


@torch.inference_mode()
def _latency(folder: Path, plan: Configuration) -> list[float]:
    """Forward passes of one token: materialised adapter over plain adapter, less one.

    The two take turns, and the median of 20 passes counts: other programs
    disturb any single one.
    """
    base = Switchable.load()
    base.switch(plan)
    model = PeftModel.from_pretrained(base.model, str(folder / "plain"), "plain")
    model.load_adapter(str(folder / "plan"), "plan")
    step = functools.partial(model, input_ids=torch.tensor([[5]]))

    def ratio() -> float:
        taken: dict[str, list[float]] = {"plan": [], "plain": []}
        for turn in range(20):
            for name in sorted(taken, reverse=bool(turn % 2)):
                model.set_adapter(name)
                step()
                taken[name].append(_seconds(step))
        return statistics.median(taken["plan"]) / statistics.median(taken["plain"])

    return [ratio() - 1 for _ in range(REPEATS)]


@torch.inference_mode()
def _packed(folder: Path, plan: Configuration) -> list[float]:
    """A token's forward pass from packed weights over one from plain weights."""
    base, other = Switchable.load(), load_model()
    base.switch(plan)
    save_packed(base, plan, folder / "packed.safetensors")
    load_packed(other, folder / "packed.safetensors")
    ids = torch.tensor([[5]])
    return [_seconds(lambda: other(input_ids=ids))
            / _seconds(lambda: base.model(input_ids=ids)) for _ in range(REPEATS)]


def _step_ratios(plans: list[Configuration]) -> list[float]:
    """For each step, seconds of CoA-LoRA over those of Shared-LoRA.

    A step has the same examples in every run. Other programs only ever add
    time, for longer than a step: so runs take turns, and each step's least
    time of all runs counts.
    """
    taken: dict[str, list[list[float]]] = {"coa": [], "lora": []}
    for turn in range(RUNS):
        for method in sorted(taken, reverse=bool(turn % 2)):
            taken[method].append(_steps(method, plans))
    ours, plain = ([min(times) for times in zip(*runs, strict=True)] for runs in taken.values())
    return [a / b for a, b in zip(ours, plain, strict=True)]


def _steps(method: str, plans: list[Configuration]) -> list[float]:
    """Seconds of each training step, among configurations that are kept."""
    base, clock = Switchable.load(), StepClock()
    for plan in plans:
        base.switch(plan)
    train_over(base, sensors("train", STEP.steps * STEP.batch_size), plans, STEP,
               method=method, callbacks=[clock])
    return clock.seconds
