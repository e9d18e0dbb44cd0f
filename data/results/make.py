"""Reference results: each piece is one command, one JSON file beside this one.

`python data/results/make.py` makes every piece that is missing, in order, so
a run that was cut goes on where it stopped; with names, it makes those again.
`python data/results/make.py readme` puts the tables into the README.
"""

import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import xllamacpp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
sys.path.append(str(HERE))  # so that this file can also be loaded from elsewhere

from ledger import SEEDS, claims_table, few_at_random
from mixed import mixed
from outliers import outliers
from packed import packed
from page import page
from picture import draw
from sevenb import sizes

from lib.artifacts import BUILD, ROOT, read_json, size_mb, versions, write_json, writing
from lib.base_model import best_dtype, load_model, load_tokenizer, machine, tiny_model
from lib.bench import run_bench
from lib.bench_serving import read_bandwidth, weight_bytes
from lib.client import ask_all, question
from lib.compare import MAIN
from lib.course import put_table
from lib.deploy_gguf import served_score
from lib.errors import UserError, require
from lib.gguf import export
from lib.gguf import save_model as gguf_model
from lib.lora import load_adapter
from lib.merge import (
    load_dynamic_int8,
    load_saved,
    merge,
    save_int8,
    save_model,
    save_nf4,
)
from lib.parity import compare
from lib.profiles import MODES, PROFILES, TrainSettings
from lib.serve import running
from lib.tasks import Record, Score, held_out_loss, keyword_score, movies, sensors
from lib.train import TrainResult, train

RESULTS = ROOT / "data" / "results"
ADAPTERS = ROOT / "data" / "adapters"
WORK = BUILD / "reference"
REFERENCE = PROFILES["reference"].train
# The sweeps compare many settings, so each run is short; the loss decides.
SWEEP = dataclasses.replace(REFERENCE, mode="lora", steps=30, batch_size=8)
# The best of `sweeps`, as LoRA's is: claim T14 compares them.
FULL_RATE = 3e-4
SIZES = (100, 300, 1000, 1600, 5000)
Task = Callable[[str], list[Record]]


def score_row(score: Score) -> dict[str, Any]:
    """A score as it is stored: share, interval, and each example's hit."""
    low, high = score.interval
    return {"share": score.share, "low": low, "high": high, "examples": len(score.hits),
            "hits": "".join("01"[h] for h in score.hits)}


def score_tests(model: Any, splits: tuple[str, ...] = ("test", "test_phrasings"), *,
                task: Task = sensors, **options: Any) -> dict[str, Any]:
    """Keyword score on the whole test, and on the phrasings never trained on."""
    tokenizer = load_tokenizer()
    return {split: score_row(keyword_score(model, tokenizer, task(split), **options))
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


def mode(name: str, task: Task = sensors) -> dict[str, Any]:
    """Train one of the three modes on all data, ship its adapter, score it."""
    return trained(f"{task.__name__}_{name}", task, shelf=ADAPTERS, mode=name)


def trained(name: str, task: Task = sensors, *, shelf: Path = WORK / "shipped",
            examples: int | None = None, **changes: Any) -> dict[str, Any]:
    """Train with some settings changed, put the adapter on the shelf, score it."""
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

    Up to 1,600 examples the steps are the same, so few examples are seen often;
    of 5,000 each is seen once, in more steps, and 1,600 are seen as long for comparison.
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


def sweeps(seed: int = 0) -> dict[str, Any]:
    """Claims T5 (modules), T7 (learning rates) and T8 (alpha), one at a time."""
    vary = functools.partial(dataclasses.replace, SWEEP, seed=seed)
    return {
        "targets": sweep({t: vary(targets=t) for t in ("minimal", "standard", "aggressive")}),
        "learning_rate": sweep(
            {f"lora {r:g}": vary(learning_rate=r) for r in (3e-4, 1e-3, 3e-3, 1e-2)}
            | {f"full {r:g}": vary(mode="full", learning_rate=r)
               for r in (3e-5, 1e-4, 3e-4, 1e-3)}),
        "alpha": sweep({f"alpha {a}": vary(alpha=a) for a in (8, 32, 128)}),
    }


def alpha() -> dict[str, Any]:
    """Claim T8 at other ranks: alpha = 2 r, one alpha for all ranks, rsLoRA's scaling.

    At rank 16 the three are one: rsLoRA's alpha of 8 over the root of 16 is 32 over 16.
    """
    vary = functools.partial(dataclasses.replace, SWEEP)
    return {f"rank {rank}": sweep({
        "alpha 2r": vary(rank=rank, alpha=2 * rank), "alpha 32": vary(rank=rank),
        "rslora 8": vary(rank=rank, alpha=8, rslora=True)}) for rank in (4, 64)}


@functools.cache
def merged_files() -> Path:
    """The QLoRA adapter, merged into the base that it was trained on, as files."""
    directory = WORK / "dequantized"
    if not (directory / "manifest.json").is_file():
        save_model(merge(ADAPTERS / "sensors_qlora", route="dequantized"), directory)
    return directory


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


@functools.cache
def edge_files() -> Path:
    """GGUF files of the shipped adapters: merged in three types, and beside their base."""
    adapter = ADAPTERS / "sensors_qlora"
    weights = merge(adapter, route="dequantized")
    for kind in ("F16", "Q8_0", "Q4_1"):
        export(WORK / "edge" / kind, kind=kind, merged=adapter, weights=weights)
    beside = {name: ADAPTERS / f"{name}_qlora" for name in ("sensors", "movies")}
    for kind in ("F16", "Q8_0"):
        export(WORK / "edge" / f"{kind}_lora", kind=kind, adapters=beside)
    return WORK / "edge"


def parity() -> dict[str, Any]:
    """llama.cpp against transformers on the file's own weights, 50 answers, teacher-forced."""
    edge, tokenizer, rows = edge_files(), load_tokenizer(), {}
    for kind in ("F16", "Q8_0", "F16_lora", "Q8_0_lora"):
        name = "sensors" if kind.endswith("_lora") else ""
        # transformers' own reader of GGUF: it shares no code with our writer.
        model = AutoModelForCausalLM.from_pretrained(
            edge / kind, gguf_file="model.gguf", dtype=torch.float32).eval()
        if name:
            model = load_adapter(model, ADAPTERS / "sensors_qlora")
        with (running(edge / kind) as served,
              httpx.Client(base_url=served.url, timeout=60) as client):
            rows[kind] = dataclasses.asdict(compare(
                model, tokenizer, client, sensors("test", 50), name=name))
        print(f"  {kind} {rows[kind]}", flush=True)
    return rows


def runtimes() -> dict[str, Any]:
    """Whole-test score of the ways in transformers that `pipeline` lacks."""
    model = load_saved(merged_files(), dtype=torch.float32)
    return {"float32": score_tests(model, ("test",)),
            "dynamic_int8": score_tests(load_dynamic_int8(merged_files()), ("test",))}


def edge() -> dict[str, Any]:
    """Whole-test score of what the server says: merged files, and base with adapter."""
    rows, records = {}, sensors("test")
    for kind in ("F16", "Q8_0", "Q4_1", "Q8_0_lora"):
        name = "sensors" if kind.endswith("_lora") else ""
        rows[kind] = {"test": score_row(served_score(edge_files() / kind, records, name)),
                      # The other adapter beside the base has no part in it.
                      "mb": sum(size_mb(f) for f in (WORK / "edge" / kind).glob("*.gguf")
                                if f.stem in ("model", name))}
        print(f"  {kind} {rows[kind]['test']['share']:.1%}", flush=True)
    return rows


def engine() -> dict[str, Any]:
    """llama.cpp alone: tensor types, threads, and the settings that might raise decode."""
    files = {}
    weights = merge(ADAPTERS / "sensors_qlora", route="dequantized")
    for kind in ("F32", "F16", "Q8_0", "Q5_0", "Q4_1", "Q4_0"):
        files[kind] = WORK / "engine" / f"{kind}.gguf"
        gguf_model(weights, files[kind], kind=kind)
    # As many blocks, but so narrow that next to nothing is read: what is left is
    # starting and joining threads, norms, attention, sampling.
    blocks = weights.config.num_hidden_layers
    files["narrow"] = WORK / "engine" / "narrow.gguf"
    gguf_model(tiny_model(blocks), files["narrow"], kind="Q8_0")
    kinds = xllamacpp.common_speculative_type

    def lookup(params: Any) -> None:
        params.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_NGRAM_MAP_K]
        params.speculative.ngram_map_k.size_n, params.speculative.ngram_map_k.size_m = 3, 6

    def draft(params: Any) -> None:
        params.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        params.speculative.draft.mparams.path = str(files["Q4_0"])

    settings: dict[str, Any] = {
        "as it is": lambda p: None,
        "flash attention off": lambda p: setattr(
            p, "flash_attn_type",
            xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED),
        "batches of 64": lambda p: setattr(p, "n_ubatch", 64),
        "no repacking": lambda p: setattr(p, "no_extra_bufts", True),
        "guess from the prompt": lookup, "guess by its own Q4_0": draft}
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(3):  # in turn, because a shared machine has slow minutes
        for name, change in settings.items():
            runs.setdefault(name, []).append(_decode(files["Q8_0"], change))
        for kind, file in files.items():
            for threads in (1, 2):
                runs.setdefault(f"{kind} {threads}", []).append(
                    _decode(file, settings["as it is"], threads))
    middle = {name: {k: statistics.median(r[k] for r in rows) for k in rows[0]}
              for name, rows in runs.items()}
    return {"settings": {name: middle[name] for name in settings},
            "read_bandwidth": read_bandwidth(),
            "types": {kind: {"mb": weight_bytes(file) / 1e6,
                             "threads_1": middle[f"{kind} 1"], "threads_2": middle[f"{kind} 2"]}
                      for kind, file in files.items()}}


def _decode(path: Path, change: Callable[[Any], None], threads: int = 2) -> dict[str, float]:
    """Median decode and prefill tokens a second of the bare engine, 4 answers."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.verbosity = str(path), 2048, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    change(params)
    server = xllamacpp.Server(params)
    timings = [server.handle_chat_completions(question(r["instruction"]))["timings"]
               for r in sensors("test", 4)]
    return {"decode": statistics.median(t["predicted_per_second"] for t in timings),
            "prefill": statistics.median(t["prompt_per_second"] for t in timings)}


def load() -> dict[str, Any]:
    """500 requests from 16 clients, lengths and adapters mixed, answers checked."""
    words = ("positive", "negative")
    tasks = {"sensors": sensors("test", 250), "movies": movies("test", 250)}
    asked = [(name, r) for pair in zip(*tasks.values(), strict=True)
             for name, r in zip(tasks, pair, strict=True)]
    bodies = [question(r["instruction"], model=name, max_tokens=8 + 8 * (i % 7))
              for i, (name, r) in enumerate(asked)]
    with running(edge_files() / "Q8_0_lora", "--slots", "8") as served:
        process = psutil.Process(served.pid)
        ask_all(served.url, bodies[:64], clients=16)
        before, start = process.memory_info().rss, time.monotonic()
        answers = ask_all(served.url, bodies, clients=16)
        seconds, after = time.monotonic() - start, process.memory_info().rss
    # A film's verdict has one word; a machine's answer names the machine first.
    own = [(a.text.strip(".").lower() in words) == (name == "movies")
           for (name, _), a in zip(asked, answers, strict=True)]
    return {"requests": len(bodies), "clients": 16, "answered": len(answers),
            "with_own_adapter": sum(own), "seconds": seconds,
            "tokens_per_s": sum(a.tokens for a in answers) / seconds,
            "memory_growth_mb": (after - before) / 1e6}


PIECES: dict[str, Callable[[], dict[str, Any]]] = {
    "qlora": lambda: mode("qlora"),
    "lora": lambda: mode("lora"),
    "pipeline": pipeline,
    "base": base,
    "full": lambda: mode("full"),
    "sweeps": sweeps,
    "training_speed": lambda: run_bench("training"),
    "targets_speed": lambda: run_bench("targets"),
    "movies": lambda: mode("qlora", movies),
    "movies_base": lambda: score_tests(load_model(), ("test",), task=movies, own=True,
                                       max_new_tokens=12),
    "parity": parity,
    "edge": edge,
    "runtimes": runtimes,
    "serving": lambda: run_bench("serving"),
    "switching": lambda: run_bench("switching"),
    "search_speed": lambda: run_bench("search"),
    "engine": engine,
    "load": load,
    "mixed": lambda: mixed(WORK, edge_files() / "Q8_0", score_row),
    "packed": lambda: packed(WORK, score_tests),
    "sizes": sizes,
    "page": page,
    "outliers": lambda: outliers(merged_files()),
    **{name: functools.partial(trained, f"sensors_{name}", **changes)
       for name, changes in variants().items()},
    "alpha": alpha,
    **{f"sweeps_{seed}": functools.partial(sweeps, seed) for seed in SEEDS[1:]},
}


def run_pieces(names: list[str], pieces: dict[str, Callable[[], dict[str, Any]]] = PIECES, *,
               results: Path = RESULTS, script: str = "make.py") -> None:
    """Make the named pieces, or all that are missing.

    Raises:
        UserError: an unknown name.
    """
    for name in names:
        require(name in pieces, f"unknown piece {name!r}: use {', '.join(pieces)}")
    missing = [n for n in pieces if not (results / f"{n}.json").is_file()]
    for name in names or missing:
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        result = pieces[name]()
        write_json(results / f"{name}.json", {
            "piece": name, "command": f"python data/results/{script} {name}",
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
        rows = [("base model, untrained", best, "-")]
    rows += [(label, results[n], f"{results[n]['saved_mb']:.1f}") for n, label in (
        ("full", "full fine-tuning"), ("lora", "LoRA, r = 16"), ("qlora", "QLoRA, r = 16"))
        if n in results]
    rows += [(label, results["pipeline"][n], f"{results['pipeline'][n]['mb']:.1f}")
             for n, label in (("dequantized", "QLoRA, merged"), ("int8", "merged, INT8"),
                              ("nf4", "merged, NF4"))
             if "pipeline" in results]
    if "edge" in results:
        rows += [(label, results["edge"][n], f"{results['edge'][n]['mb']:.1f}")
                 for n, label in (("Q8_0", "merged, GGUF Q8_0, served"),
                                  ("Q8_0_lora", "GGUF Q8_0 base and adapter, served"))]
    if "mixed" in results:
        row = next(iter(results["mixed"].values()))
        rows += [(f"merged, GGUF of mixed types ({row['bits']:.2g} bits), served", row,
                  f"{row['mb']:.1f}")]
    rows += [(f"CoA-LoRA, longer trained, packed ({row['bits']:.2g} bits)", row,
              f"{row['mb']:.1f}") for row in results.get("packed", {}).values()]
    lines = ["| model | test | new phrasings | saved, MB |", "|---|---|---|---|"]
    for label, row, size in rows:
        cells = [_share(row[split]) if row.get(split) else "-"
                 for split in ("test", "test_phrasings")]
        lines.append(f"| {label} | {cells[0]} | {cells[1]} | {size} |")
    return "\n".join([*lines, "", *_readme_speeds(results)])


def _readme_speeds(results: dict[str, Any]) -> list[str]:
    def times(row: dict[str, Any], key: str) -> str:
        low, high = row[f"{key}_spread"]
        return f"{row[key]:.1f} times ({low:.1f} to {high:.1f})"

    lines = []
    if row := results.get("training_speed"):
        lines += [f"- Training step: {times(row, 'ratio')} the stock trainer's tokens per "
                  f"second with all seven modules, {times(row, 'ratio_attention')} with "
                  "attention alone, at the same loss."]
    if row := results.get("serving"):
        lines += [f"- Decoding: llama.cpp's Q8_0 runs at {times(row, 'ratio')} the speed of "
                  "LLM.int8 in transformers; four clients together get "
                  f"{times(row, 'clients_ratio')} the tokens of one."]
    if "mixed" in results:
        budget, row = next(iter(results["mixed"].items()))
        lines += [f"- `deploy --format gguf --budget-mb {budget}` decodes at "
                  f"{times(row, 'ratio')} the speed of Q8_0."]
    return lines


def card_table() -> str:
    """The model card's scores; a configuration-aware adapter's at a few plans it never saw."""
    lines = ["| adapter | at | right answers | held-out loss |", "|---|---|---|---|"]
    for name, piece in (("sensors_qlora", "qlora"), ("sensors_lora", "lora"),
                        ("movies_qlora", "movies")):
        row = read_json(RESULTS / f"{piece}.json")["result"]
        lines.append(f"| {name} | its own base | {_share(row['test'])} of "
                     f"{row['test']['examples']} | {row['validation_loss']:.4f} |")
    for task in ("sensors", "movies"):
        plans = read_json(RESULTS / "coa" / f"{task}-long-0.json")["result"]["plans"]
        # Those that the measured scores are of, and random plans of few bits.
        few = few_at_random(plans)
        for plan in (p for p in plans if p in MAIN or p in few):
            row = plans[plan].get("score")
            score = f"{_share(row)} of {row['examples']}" if row else "not scored"
            lines.append(f"| {task}_coa | {plan} bits | {score} | {plans[plan]['loss']:.4f} |")
    return "\n".join(lines)


def _share(row: dict[str, Any]) -> str:
    return f"{100 * row['share']:.1f} % ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def write_readme() -> None:
    """Put the tables between the marks of the README and the card; draw the picture anew."""
    put_table(ROOT / "README.md", "results", readme_table())
    put_table(ROOT / "README.md", "claims", claims_table())
    put_table(ADAPTERS / "README.md", "card", card_table())
    draw(RESULTS)


if __name__ == "__main__":
    try:
        if sys.argv[1:] == ["readme"]:
            write_readme()
        else:
            run_pieces(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
