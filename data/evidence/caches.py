"""llama.cpp's two caches: keys and values in 16 or 8 bits, and prompts kept beside the slots.

Each setting runs in a process of its own, in turn: a long prompt, then conversations that share
a system prompt and are more than the slots.
"""

import multiprocessing
import statistics
from pathlib import Path
from typing import Any

import psutil
import xllamacpp

from lib.base.records import DATA, sensors
from lib.client import question
from lib.settings import ServeSettings

SETTINGS: dict[str, dict[str, Any]] = {
    "16 bits": {}, "8 bits": {"cache_type_k": 8, "cache_type_v": 8},  # GGML_TYPE_Q8_0
    "prompts in 256 MB": {"cache_ram_mib": 256}}
REPEATS, ANSWERS, CONVERSATIONS = 5, 50, 8
LONG, SHARED = 6000, 2400  # characters: about 1,300 and 500 tokens


def caches(path: Path) -> dict[str, Any]:
    """{setting: medians}, and the share of greedy answers that equal those of 16 bits."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    for turn in range(REPEATS):
        for name, change in SETTINGS.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                runs[name].append(pool.apply(_measure, (str(path), change, turn == 0)))
            print(f"  {name}: {runs[name][-1] | {'texts': '...'}}", flush=True)
    texts = {name: rows[0]["texts"] for name, rows in runs.items()}
    result: dict[str, Any] = {}
    for name, rows in runs.items():
        keys = [key for key in rows[0] if key != "texts"]
        result[name] = {key: statistics.median(row[key] for row in rows) for key in keys}
        result[name]["ratios"] = {key: sorted(row[key] / base[key] for row, base in zip(
            rows, runs["16 bits"], strict=True)) for key in keys}
        same = [a == b for a, b in zip(texts[name], texts["16 bits"], strict=True)]
        result[name]["equal_answers"] = sum(same) / len(same)
    return result


def _measure(path: str, change: dict[str, Any], answer: bool) -> dict[str, Any]:
    settings, params = ServeSettings(), xllamacpp.CommonParams()
    params.model.path, params.verbosity = path, 0
    params.n_parallel, params.n_ctx = settings.slots, settings.context * settings.slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    for name, value in ({"cache_ram_mib": 0} | change).items():
        setattr(params, name, xllamacpp.ggml_type(value) if "type" in name else value)
    server = xllamacpp.Server(params)
    text = (DATA / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")

    def timings(body: dict[str, Any]) -> dict[str, float]:
        return server.handle_chat_completions(body)["timings"]

    long = [timings(question(text[at: at + LONG], max_tokens=64, ignore_eos=True))
            for at in (0, LONG, 2 * LONG, 3 * LONG)]  # one in each slot
    row = {"decode": statistics.median(t["predicted_per_second"] for t in long),
           "prefill": statistics.median(t["prompt_per_second"] for t in long)}
    # The first round fills the slots; each conversation of the second comes back to them.
    asked = sensors("test", CONVERSATIONS)
    for _ in range(2):
        row["again_ms"] = statistics.median(timings(question("", messages=[
            {"role": "system", "content": text[:SHARED]},
            {"role": "user", "content": record["instruction"]}]))["prompt_ms"]
            for record in asked)
    row["memory_mb"] = psutil.Process().memory_info().rss / 1e6
    texts = [server.handle_chat_completions(question(r["instruction"]))["choices"][0]["message"][
        "content"] for r in sensors("test", ANSWERS if answer else 0)]
    return row | {"texts": texts}
