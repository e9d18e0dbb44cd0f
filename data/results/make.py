"""Reference results: each piece is one command, one JSON file beside this one.

`python data/results/make.py` makes every piece that is missing, in order, so
a run that was cut goes on where it stopped; with names, it makes those again.
`python data/results/make.py readme` puts the table into the README.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lib.artifacts import BUILD, ROOT, read_json, size_mb, versions, write_json, writing
from lib.base_model import best_dtype, load_model, load_tokenizer, machine
from lib.errors import UserError, require
from lib.merge import load_saved, merge, save_int8, save_model, save_nf4
from lib.profiles import PROFILES, TrainSettings
from lib.tasks import Score, held_out_loss, keyword_score, sensors
from lib.train import TrainResult, train

RESULTS = ROOT / "data" / "results"
ADAPTERS = ROOT / "data" / "adapters"
WORK = BUILD / "reference"
REFERENCE = PROFILES["reference"].train
# The sweeps compare many settings, so each run is short; the loss decides.
SWEEP = dataclasses.replace(REFERENCE, mode="lora", steps=30, batch_size=8)
FULL_RATE = 1e-4
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def score_row(score: Score) -> dict[str, Any]:
    """A score as it is stored: share, interval, and each example's hit."""
    low, high = score.interval
    return {"share": score.share, "low": low, "high": high, "examples": len(score.hits),
            "hits": "".join("01"[h] for h in score.hits)}


def score_tests(model: Any, splits: tuple[str, ...] = ("test", "test_phrasings"),
                **options: Any) -> dict[str, Any]:
    """Keyword score on the whole test, and on the phrasings never trained on."""
    tokenizer = load_tokenizer()
    return {split: score_row(keyword_score(model, tokenizer, sensors(split), **options))
            for split in splits}


def base() -> dict[str, Any]:
    """The untrained model, in the course's template and in its own."""
    model = load_model()
    return {"course_template": score_tests(model, ("test",)),
            "own_template": score_tests(model, ("test",), own=True)}


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
        model = result.model
    else:
        # What is scored is the shipped float16 adapter, folded into the base
        # it was trained on: the same sums, without unpacking 4 bits each time.
        ship(out, ADAPTERS / out.name)
        route = "dequantized" if name == "qlora" else "original"
        model = merge(ADAPTERS / out.name, route=route)
    # In the machine's fast dtype, as it would be served.
    model.to(best_dtype())
    validation = held_out_loss(model, load_tokenizer(), sensors("validation"))
    return row | score_tests(model) | {"validation_loss": validation}


def ship(source: Path, target: Path) -> None:
    """Copy an adapter with its weights in float16."""
    with writing(target, base="embedded", trained_by="python data/results/make.py") as part:
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


def sweeps() -> dict[str, Any]:
    """Claims T5 (modules), T7 (learning rates) and T8 (alpha), one at a time."""
    vary = functools.partial(dataclasses.replace, SWEEP)
    return {
        "targets": sweep({t: vary(targets=t) for t in ("minimal", "standard", "aggressive")}),
        "learning_rate": sweep(
            {f"lora {r:g}": vary(learning_rate=r) for r in (3e-4, 1e-3, 3e-3, 1e-2)}
            | {f"full {r:g}": vary(mode="full", learning_rate=r)
               for r in (3e-5, 1e-4, 3e-4, 1e-3)}),
        "alpha": sweep({f"alpha {a}": vary(alpha=a) for a in (8, 32, 128)}),
    }


def pipeline() -> dict[str, Any]:
    """Whole-test score and size after each step: merge, INT8, NF4 (T10, T11)."""
    adapter = ADAPTERS / "sensors_qlora"
    for route in ("original", "dequantized"):
        save_model(merge(adapter, route=route), WORK / route)
    save_int8(WORK / "dequantized", WORK / "int8")
    save_nf4(WORK / "dequantized", WORK / "nf4")
    return {"adapter": {"mb": size_mb(adapter)}} | {
        name: _artifact_row(WORK / name) for name in ("dequantized", "original", "int8", "nf4")}


def _artifact_row(directory: Path) -> dict[str, Any]:
    return score_tests(load_saved(directory), ("test",)) | {"mb": size_mb(directory)}


def training_speed() -> dict[str, Any]:
    """Our training step against the stock one."""
    from lib.bench import training

    return training()


PIECES: dict[str, Callable[[], dict[str, Any]]] = {
    "qlora": lambda: mode("qlora"),
    "lora": lambda: mode("lora"),
    "pipeline": pipeline,
    "base": base,
    "full": lambda: mode("full"),
    "sweeps": sweeps,
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
            "piece": name, "command": f"python data/results/make.py {name}",
            "made": time.strftime("%Y-%m-%d"), "machine": machine() | {
                "torch_threads": torch.get_num_threads()},
            "versions": versions(), "piece_seconds": round(time.monotonic() - start),
            "result": result})
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def readme_table() -> str:
    """The README's results, from the stored files that are there."""
    results = {n: read_json(RESULTS / f"{n}.json")["result"] for n in PIECES
               if (RESULTS / f"{n}.json").is_file()}
    rows = []
    if "base" in results:
        best = max(results["base"].values(), key=lambda row: row["test"]["share"])
        rows = [("base model (its better template)", best, "-")]
    rows += [(label, results[n], f"{results[n]['saved_mb']:.1f}") for n, label in (
        ("full", "full fine-tuning"), ("lora", "LoRA, r = 16"), ("qlora", "QLoRA, r = 16"))
        if n in results]
    rows += [(label, results["pipeline"][n], f"{results['pipeline'][n]['mb']:.1f}")
             for n, label in (("dequantized", "QLoRA, merged"), ("int8", "merged, INT8"),
                              ("nf4", "merged, NF4"))
             if "pipeline" in results]
    lines = ["| model | test | new phrasings | saved, MB |", "|---|---|---|---|"]
    for label, row, size in rows:
        cells = [f"{100 * x['share']:.1f} % ({100 * x['low']:.1f} to {100 * x['high']:.1f})"
                 if (x := row.get(split)) else "-" for split in ("test", "test_phrasings")]
        lines.append(f"| {label} | {cells[0]} | {cells[1]} | {size} |")
    return "\n".join(lines)


def write_readme() -> None:
    """Put the table between the README's markers."""
    path = ROOT / "README.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{readme_table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    try:
        if sys.argv[1:] == ["readme"]:
            write_readme()
        else:
            run_pieces(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
