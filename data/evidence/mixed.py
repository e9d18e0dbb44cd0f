"""A GGUF file of mixed types against Q8_0: size, speed in turn, the whole test."""

import shutil
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from data.evidence.bench import median_and_range
from data.evidence.pieces import score_row, served_score
from lib.base.records import sensors
from lib.client import ask, question
from lib.deploy.deployment import deploy, shipped
from lib.files import size_mb
from lib.serve.server import running

# MB, all files counted: near the smallest possible, with the embedding in 4 bits; and 5.5 bits for
# each of 134.5 million weights.
BUDGETS = (80.0, 92.4)
REPEATS, QUESTIONS = 7, 6


def mixed(work: Path, q8: Path) -> dict[str, Any]:
    """{budget: the files of `deploy --format gguf`, their score, their speed over Q8_0's}.

    `ready_s` is the time from the budget to a listening server, with the model in the cache.
    """
    rows = {}
    for budget in BUDGETS:
        out = work / f"mixed_{budget:g}"
        shutil.rmtree(out, ignore_errors=True)
        start = time.monotonic()
        deployed = deploy(budgets=[budget], out=out, **shipped("sensors", "gguf"))[budget]
        with running(out) as served:
            ready = time.monotonic() - start
            with running(q8) as other:
                speeds = in_turn((served.url, ""), (other.url, ""))
        rows[f"{budget:g}"] = {
            "types": dict(Counter(map(str, deployed.configuration.formats))),
            "table": str(deployed.table), "bits": deployed.configuration.bits,
            "ready_s": round(ready, 1),
            "mb": deployed.actual_mb, "model_mb": size_mb(out / "model.gguf"),
            "test": score_row(served_score(out, sensors("test")))} | speeds
        row = rows[f"{budget:g}"]
        print(f"  {budget:g} MB: {row['ratio']:.2f} times Q8_0, "
              f"{row['test']['share']:.1%}", flush=True)
    return rows


def in_turn(one: tuple[str, str], other: tuple[str, str]) -> dict[str, Any]:
    """Decode tokens a second of two servers that take turns; their ratio in each repeat."""
    rows: dict[str, list[float]] = {"tokens_per_s": [], "q8_tokens_per_s": [], "ratio": []}
    texts = iter(r["instruction"] for r in sensors("test"))
    for _ in range(REPEATS):
        speeds: dict[str, list[float]] = {one[0]: [], other[0]: []}
        for _ in range(QUESTIONS):
            text = next(texts)
            for url, name in (one, other):
                with httpx.Client(base_url=url, timeout=600) as client:
                    speeds[url].append(ask(client, question(text, model=name)).decode)
        ours, theirs = (statistics.median(speeds[url]) for url in (one[0], other[0]))
        for key, value in zip(rows, (ours, theirs, ours / theirs), strict=True):
            rows[key].append(value)
    return median_and_range(rows)
