"""A GGUF file of mixed types against Q8_0: size, speed in turn, the whole test."""

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from lib.artifacts import size_mb
from lib.client import ask, question
from lib.deploy import folder_size
from lib.deploy_gguf import deploy_gguf, served_score
from lib.measure import middle_and_spread
from lib.serve import running
from lib.tasks import Score, sensors

# Near the least there is, where the embedding has 4 bits, and 5.5 bits for each of 134.5
# million weights, all files counted.
BUDGETS = (80.0, 92.4)
REPEATS, QUESTIONS = 7, 6


def mixed(work: Path, q8: Path, score_row: Callable[[Score], dict[str, Any]]) -> dict[str, Any]:
    """{budget: what `deploy --format gguf` makes of it, its answers, its speed over Q8_0's}.

    `ready_s` is from the budget to a server that listens, the model in the cache.
    """
    rows = {}
    for budget in BUDGETS:
        out = work / f"mixed_{budget:g}"
        shutil.rmtree(out, ignore_errors=True)
        start = time.monotonic()
        made = deploy_gguf("sensors", budget, out)
        with running(out) as served:
            ready = time.monotonic() - start
            name = "sensors" if made.way == "beside" else ""
            with running(q8) as other:
                speeds = in_turn((served.url, name), (other.url, ""))
        rows[f"{budget:g}"] = {
            "way": made.way, "types": made.types, "bits": made.bits, "ready_s": round(ready, 1),
            "mb": folder_size(out) / 1e6, "model_mb": size_mb(out / "model.gguf"),
            "test": score_row(served_score(out, sensors("test"), name))} | speeds
        print(f"  {budget:g} MB: {made.bits:.2f} bits, {rows[f'{budget:g}']['ratio']:.2f} times "
              f"Q8_0, {rows[f'{budget:g}']['test']['share']:.1%}", flush=True)
    return rows


def in_turn(one: tuple[str, str], other: tuple[str, str]) -> dict[str, Any]:
    """Decode tokens a second of two servers that take turns; their ratio in each repeat."""
    rows: dict[str, list[float]] = {"tokens_per_s": [], "q8_tokens_per_s": [], "ratio": []}
    texts = iter(r["instruction"] for r in sensors("test"))
    for _ in range(REPEATS):
        asked: dict[str, list[float]] = {one[0]: [], other[0]: []}
        for _ in range(QUESTIONS):
            text = next(texts)
            for url, name in (one, other):
                with httpx.Client(base_url=url, timeout=600) as client:
                    asked[url].append(ask(client, question(text, model=name)).decode)
        ours, theirs = (statistics.median(asked[url]) for url in (one[0], other[0]))
        for key, value in zip(rows, (ours, theirs, ours / theirs), strict=True):
            rows[key].append(value)
    return middle_and_spread(rows)
