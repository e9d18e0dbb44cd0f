"""The training runs: three modes, further seeds, target sets, ranks, dataset sizes, sweeps."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from data.evidence.ledger import BATCHES, SEEDS
from data.evidence.pieces import ADAPTERS, WORK, Task, score_tests, training_row
from lib.base.model import best_dtype, load_tokenizer
from lib.base.records import sensors
from lib.evaluate.scores import held_out_loss
from lib.files import size_mb, writing
from lib.quantize.merging import merge
from lib.settings import MODES, PROFILES, TrainSettings
from lib.train.training import train

REFERENCE = PROFILES["reference"].train
# The sweeps compare many settings, so each run is short; the loss decides.
SWEEP = dataclasses.replace(REFERENCE, mode="lora", steps=30, batch_size=8)
# The best of a first, coarser sweep, as LoRA's is: claim T14 compares them.
FULL_RATE = 3e-4
SIZES = (100, 300, 1000, 1600, 5000)


def mode(name: str, task: Task = sensors) -> dict[str, Any]:
    """Train one of the three modes on all data, ship its adapter, score it."""
    return trained(f"{task.__name__}_{name}", task, shelf=ADAPTERS, mode=name)


def trained(name: str, task: Task = sensors, *, shelf: Path = WORK / "shipped",
            examples: int | None = None, **changes: Any) -> dict[str, Any]:
    """Train with some settings changed, store the adapter on the shelf, score it."""
    rate = FULL_RATE if changes["mode"] == "full" else REFERENCE.learning_rate
    settings = dataclasses.replace(REFERENCE, **{"learning_rate": rate} | changes)
    out = WORK / name
    result = train(task("train")[:examples], settings, out=out, say_every=10)
    row = training_row(result, settings) | {"saved_mb": size_mb(out)}
    if settings.mode == "full":
        model = result.model
    else:
        # What is scored is the shipped float16 adapter, folded into the base
        # it was trained on: the same sums, without unpacking 4 bits each time.
        ship(out, shelf / name)
        route = "dequantized" if settings.mode == "qlora" else "original"
        model = merge(shelf / name, route=route)
    # In the machine's fast dtype, as it would be served.
    model.to(best_dtype())
    validation = held_out_loss(model, load_tokenizer(), task("validation"))
    splits = ("test", "test_phrasings") if task is sensors else ("test",)
    return row | score_tests(model, splits, task=task) | {"validation_loss": validation}


def variants() -> dict[str, dict[str, Any]]:
    """{piece: what it changes}: further seeds (T14), target sets and ranks (T5), sizes (T6).

    Up to 1,600 examples the steps are the same, so a small set is seen more often. The 5,000
    are each seen once, in more steps; 1,600 with as many steps are there for comparison.
    Alpha stays twice the rank.
    """
    longest = math.ceil(SIZES[-1] / REFERENCE.batch_size)
    return ({f"{mode}_{seed}": {"mode": mode, "seed": seed}
             for seed in SEEDS[1:] for mode in MODES}
            | {f"targets_{name}": {"mode": "lora", "targets": name}
               for name in ("minimal", "standard")}
            | {f"rank_{rank}": {"mode": "lora", "rank": rank, "alpha": 2 * rank}
               for rank in (4, 64)}
            | {f"curve_{size}": {"mode": "lora", "examples": size, "steps": max(
                REFERENCE.steps, math.ceil(size / REFERENCE.batch_size))} for size in SIZES}
            | {"curve_1600_longer": {"mode": "lora", "examples": 1600, "steps": longest}}
            | {f"full_1e-4_{seed}".removesuffix("_0"): {
                "mode": "full", "learning_rate": 1e-4, "seed": seed} for seed in SEEDS})


def ship(source: Path, target: Path) -> None:
    """Copy an adapter with its weights in float16."""
    with writing(target, base="embedded", trained_by="python -m data.evidence") as part:
        weights = load_file(source / "adapter_model.safetensors")
        save_file({k: v.half() for k, v in weights.items()}, part / "adapter_model.safetensors")
        for name in ("adapter_config.json", "losses.json"):
            (part / name).write_bytes((source / name).read_bytes())


def sweep(settings: dict[str, TrainSettings]) -> dict[str, Any]:
    """Short runs that differ in one setting, judged by held-out loss."""
    rows = {}
    for name, one in settings.items():
        print(f"  {name}", flush=True)
        rows[name] = _sweep_row(one)
    return rows


@functools.cache
def _sweep_row(settings: TrainSettings) -> dict[str, Any]:
    records = sensors("train")[: settings.steps * settings.batch_size]
    try:
        result = train(records, settings)
    except Exception as error:
        if "the loss became" not in str(error):
            raise
        return {"settings": dataclasses.asdict(settings), "diverged": True,
                "validation_loss": None}
    loss = held_out_loss(result.model, load_tokenizer(), sensors("validation", 100))
    return training_row(result, settings) | {"validation_loss": loss}


def sweeps(seed: int = 0) -> dict[str, Any]:
    """Claims T5 (modules), T7 (learning rates) and T8 (alpha), one at a time."""
    vary = functools.partial(dataclasses.replace, SWEEP, seed=seed)
    return {
        "targets": sweep({t: vary(targets=t) for t in ("minimal", "standard", "aggressive")}),
        "learning_rate": sweep(
            {f"lora {r:g}": vary(learning_rate=r) for r in (3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)}
            | {f"full {r:g}": vary(mode="full", learning_rate=r)
               for r in (3e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3)}),
        "alpha": sweep({f"alpha {a}": vary(alpha=a) for a in (8, 32, 64, 128, 256, 512)}),
    }


def batches(seed: int = 0) -> dict[str, Any]:
    """Claim F2: the same 240 examples in small and in large batches, for LoRA and for full
    fine-tuning, each at several rates: {"lora 8": {rate: row}, ...}."""
    rates, rows = {"lora": 4e-3, "full": 4e-4}, {}
    for mode in rates:
        for size in BATCHES:
            print(f"  {mode}, batches of {size}", flush=True)
            rows[f"{mode} {size}"] = climb_rates(dataclasses.replace(
                SWEEP, mode=mode, seed=seed, batch_size=size, accumulate=size // BATCHES[0],
                steps=SWEEP.steps * SWEEP.batch_size // size, learning_rate=rates[mode]))
    return rows


def climb_rates(settings: TrainSettings) -> dict[str, Any]:
    """Runs at rates that double, or halve, until the loss rises on both sides of the best."""
    rows: dict[str, Any] = {}

    def loss(rate: float) -> float:
        row = rows[f"{rate:g}"] = _sweep_row(dataclasses.replace(settings, learning_rate=rate))
        print(f"    {rate:g}: {row['validation_loss']}", flush=True)
        return row["validation_loss"] or math.inf

    start = settings.learning_rate
    first = best = loss(start)
    for factor in (2.0, 0.5):
        rate = start * factor
        while (now := loss(rate)) < best:
            best, rate = now, rate * factor
        if best < first:  # so the other side is worse
            break
    return rows


def alpha() -> dict[str, Any]:
    """Claim T8 at other ranks: alpha = 2 r, one alpha for all ranks, rsLoRA's scaling.

    At rank 16 the three are one: rsLoRA's alpha of 8 over the root of 16 is 32 over 16.
    """
    vary = functools.partial(dataclasses.replace, SWEEP)
    return {f"rank {rank}": sweep({
        "alpha 2r": vary(rank=rank, alpha=2 * rank), "alpha 32": vary(rank=rank),
        "rslora 8": vary(rank=rank, alpha=8, rslora=True)}) for rank in (4, 64)}
