"""The stored results of the course's main line, each a piece with one JSON file."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM

from data.evidence.answer import answer
from data.evidence.bench import run_bench
from data.evidence.bench_serving import engines
from data.evidence.busy import busy
from data.evidence.caches import caches
from data.evidence.clients import clients
from data.evidence.engine import engine
from data.evidence.gemma import gemma
from data.evidence.ledger import SEEDS
from data.evidence.load import faults, load, load_budgets, soak
from data.evidence.mixed import mixed
from data.evidence.outliers import outliers
from data.evidence.packed import packed
from data.evidence.page import page
from data.evidence.parity import compare
from data.evidence.pieces import ADAPTERS, WORK, Piece, score_row, score_tests, served_score
from data.evidence.sevenb import sizes
from data.evidence.training_runs import alpha, batches, mode, sweeps, trained, variants
from data.evidence.types import types, types_speed
from data.evidence.vllm import compared
from lib.base.model import load_model, load_tokenizer
from lib.base.records import movies, sensors
from lib.files import size_mb
from lib.quantize.gguf import export
from lib.quantize.merging import (
    load_dynamic_int8,
    load_saved,
    merge,
    save_model,
    save_quantized,
)
from lib.serve.server import running
from lib.train.lora import load_adapter


def base() -> dict[str, Any]:
    """The untrained model, in the course's template and in its own."""
    model = load_model()
    return {"course_template": score_tests(model, ("test",)),
            "own_template": score_tests(model, ("test",), template="own")}


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
    save_quantized(WORK / "dequantized", WORK / "int8", 8)
    save_quantized(WORK / "dequantized", WORK / "nf4", 4)
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
        export(WORK / "edge" / kind, gguf_type=kind, merged=adapter, weights=weights,
               route="dequantized")
    beside = {name: ADAPTERS / f"{name}_qlora" for name in ("sensors", "movies")}
    for kind in ("F16", "Q8_0"):
        export(WORK / "edge" / f"{kind}_lora", gguf_type=kind, adapters=beside,
               route="dequantized")
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


_MAKERS: dict[str, Callable[[], dict[str, Any]]] = {
    "qlora": lambda: mode("qlora"),
    "lora": lambda: mode("lora"),
    "pipeline": pipeline,
    "base": base,
    "full": lambda: mode("full"),
    "sweeps": sweeps,
    "training_speed": lambda: run_bench("training"),
    "targets_speed": lambda: run_bench("targets"),
    "movies": lambda: mode("qlora", movies),
    "movies_base": lambda: score_tests(load_model(), ("test",), task=movies, template="own",
                                       max_new_tokens=12),
    "parity": parity,
    "edge": edge,
    "runtimes": runtimes,
    "serving_speed": lambda: run_bench("serving"),
    "switching_speed": lambda: run_bench("switching"),
    "search_speed": lambda: run_bench("search"),
    "engine": engine,
    "engines": engines,
    "busy": busy,
    "caches": lambda: caches(edge_files() / "Q8_0" / "model.gguf"),
    "gemma": gemma,
    "types": lambda: types(WORK), "types_speed": lambda: types_speed(WORK),
    "vllm": compared,
    "clients": lambda: clients(edge_files() / "Q8_0_lora"),
    "load": lambda: load(edge_files() / "Q8_0_lora"),
    "load_budgets": lambda: load_budgets(WORK / "load_budgets"),
    "faults": lambda: faults(edge_files() / "Q8_0_lora"),
    "soak": lambda: soak(edge_files() / "Q8_0_lora"),
    "mixed": lambda: mixed(WORK, edge_files() / "Q8_0"),
    "packed": lambda: packed(WORK),
    "sizes": sizes,
    "page": page,
    "answer": answer,
    "outliers": lambda: outliers(merged_files()),
    **{name: functools.partial(trained, f"sensors_{name}", **changes)
       for name, changes in variants().items()},
    "alpha": alpha,
    **{f"sweeps_{seed}": functools.partial(sweeps, seed) for seed in SEEDS[1:]},
    **{f"batches_{seed}": functools.partial(batches, seed) for seed in SEEDS},
}
# "serving" and "switching" are the names of the benchmarks.
_FILES = {"serving_speed": "serving", "switching_speed": "switching"}
PIECES = {name: Piece(_FILES.get(name, name), make) for name, make in _MAKERS.items()}
