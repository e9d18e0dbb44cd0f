"""Reference results: each piece is one command, one JSON file in data/results/.

`python -m lib reference` makes every piece that is missing, in order, so a
run that was cut goes on where it stopped. `python -m lib reference lora`
makes one again.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lib.artifacts import BUILD, ROOT, size_mb, versions, write_json, writing
from lib.base_model import load_model, load_tokenizer, machine
from lib.errors import require
from lib.lora import load_adapter
from lib.merge import ROUTES, load_saved, merge, save_int8, save_model, save_nf4
from lib.profiles import PROFILES, TrainSettings
from lib.tasks import Score, held_out_loss, keyword_score, sensors
from lib.train import TrainResult, base_for, train

RESULTS = ROOT / "data" / "results"
ADAPTERS = ROOT / "data" / "adapters"
WORK = BUILD / "reference"
REFERENCE = PROFILES["reference"].train
# The sweeps compare many settings, so each run is short; the loss decides.
SWEEP = dataclasses.replace(REFERENCE, mode="lora", steps=60, batch_size=8, learning_rate=2e-3)
FULL_RATE = 1e-4


def score_row(score: Score) -> dict[str, Any]:
    """A score as it is stored: share, interval, and each example's hit."""
    low, high = score.interval
    return {"share": score.share, "low": low, "high": high, "examples": len(score.hits),
            "hits": "".join("01"[h] for h in score.hits)}


def score_tests(model: Any, **options: Any) -> dict[str, Any]:
    """Keyword score on the test and on the phrasings never trained on."""
    tokenizer = load_tokenizer()
    return {split: score_row(keyword_score(model, tokenizer, sensors(split), **options))
            for split in ("test", "test_phrasings")}


def base() -> dict[str, Any]:
    """The untrained model, in the course's template and in its own."""
    model = load_model()
    return {"course_template": score_tests(model), "own_template": score_tests(model, own=True)}


def training_row(result: TrainResult, settings: TrainSettings) -> dict[str, Any]:
    """Cost of a run, its settings and its loss history."""
    return {"settings": dataclasses.asdict(settings), "seconds": round(result.seconds, 1),
            "peak_mb": round(result.peak_mb), "trainable": result.trainable,
            "parameters": result.parameters, "optimizer_mb": round(result.optimizer_mb, 2),
            "losses": [round(x, 4) for x in result.losses]}


def mode(name: str) -> dict[str, Any]:
    """Train one of the three modes on all data, ship its adapter, score it."""
    settings = dataclasses.replace(
        REFERENCE, mode=name,
        learning_rate=FULL_RATE if name == "full" else REFERENCE.learning_rate)
    out = WORK / f"sensors_{name}"
    result = train(sensors("train"), settings, out=out, say_every=10)
    row = training_row(result, settings) | {"saved_mb": size_mb(out)}
    if name == "full":
        # Scored as it would be served: in the machine's fast dtype.
        result.model.to(load_model().dtype)
    else:
        ship(out, ADAPTERS / out.name)
        base_model = base_for(name, "embedded")
        result = dataclasses.replace(result, model=load_adapter(base_model, ADAPTERS / out.name))
    validation = held_out_loss(result.model, load_tokenizer(), sensors("validation"))
    return row | score_tests(result.model) | {"validation_loss": validation}


def ship(source: Path, target: Path) -> None:
    """Copy an adapter with its weights in float16."""
    with writing(target, base="embedded", trained_by="python -m lib reference") as part:
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


def _sweep_row(settings: TrainSettings) -> dict[str, Any]:
    records = sensors("train")[: settings.steps * settings.batch_size]
    try:
        result = train(records, settings)
    except Exception as error:
        if "the loss became" not in str(error):
            raise
        return {"settings": dataclasses.asdict(settings), "diverged": True,
                "validation_loss": math.inf}
    loss = held_out_loss(result.model, load_tokenizer(), sensors("validation", 200))
    return training_row(result, settings) | {"validation_loss": loss}


def targets() -> dict[str, Any]:
    """Claim T5: which modules get an adapter."""
    return sweep({t: dataclasses.replace(SWEEP, targets=t)
                  for t in ("minimal", "standard", "aggressive")})


def learning_rate() -> dict[str, Any]:
    """Claim T7: the learning rates that LoRA and full fine-tuning want."""
    lora = {f"lora {r:g}": dataclasses.replace(SWEEP, learning_rate=r)
            for r in (2e-4, 6e-4, 2e-3, 6e-3, 2e-2)}
    full = {f"full {r:g}": dataclasses.replace(SWEEP, mode="full", learning_rate=r)
            for r in (2e-5, 6e-5, 2e-4, 6e-4, 2e-3)}
    return sweep(lora | full)


def alpha() -> dict[str, Any]:
    """Claim T8: alpha = 2 r, and rsLoRA's alpha / sqrt(r)."""
    runs = {f"alpha {a}": dataclasses.replace(SWEEP, alpha=a) for a in (8, 16, 32, 64, 128)}
    return sweep(runs | {"rslora alpha 16": dataclasses.replace(SWEEP, alpha=16, rslora=True)})


def pipeline() -> dict[str, Any]:
    """Score and size after each step: merge routes, INT8, NF4 (T10, T11)."""
    adapter = ADAPTERS / "sensors_qlora"
    rows: dict[str, Any] = {"adapter": {"mb": size_mb(adapter)}}
    for route in ROUTES:
        model = merge(adapter, route=route)
        if route == "through_4bit":
            rows[route] = score_tests(model)
            continue
        out = WORK / f"merged_{route}"
        save_model(model, out)
        rows[route] = score_tests(load_saved(out)) | {"mb": size_mb(out)}
    best = WORK / "merged_dequantized"
    for name, save in (("int8", save_int8), ("nf4", save_nf4)):
        save(best, WORK / name)
        rows[name] = score_tests(load_saved(WORK / name)) | {"mb": size_mb(WORK / name)}
    return rows


def training_speed() -> dict[str, Any]:
    """Our training step against the stock one."""
    from lib.bench import training

    return training()


PIECES: dict[str, Callable[[], dict[str, Any]]] = {
    "base": base,
    "lora": lambda: mode("lora"),
    "qlora": lambda: mode("qlora"),
    "pipeline": pipeline,
    "full": lambda: mode("full"),
    "targets": targets,
    "learning_rate": learning_rate,
    "alpha": alpha,
    "training_speed": training_speed,
}


def run_pieces(names: list[str]) -> None:
    """Make the named pieces, or all that are missing.

    Raises:
        UserError: an unknown name.
    """
    for name in names:
        require(name in PIECES, f"unknown piece {name!r}: use {', '.join(PIECES)}")
    missing = [n for n in PIECES if not (RESULTS / f"{n}.json").is_file()]
    for name in names or missing:
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        result = PIECES[name]()
        write_json(RESULTS / f"{name}.json", {
            "piece": name, "command": f"python -m lib reference {name}",
            "made": time.strftime("%Y-%m-%d"), "machine": machine() | {
                "torch_threads": torch.get_num_threads()},
            "versions": versions(), "piece_seconds": round(time.monotonic() - start),
            "result": result})
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
