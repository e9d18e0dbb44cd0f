"""Benchmarks: ratios measured within one run; median and range of several repeats."""

import statistics
from importlib import import_module
from typing import Any

from lib.errors import require
from lib.files import versions

# {name: module}: each is the function of its name in data/evidence/bench_MODULE.py.
BENCHES = {name: name for name in ("training", "serving", "switching", "search", "dtypes")
           } | {"targets": "training"}


def run_bench(name: str, engine: str = "") -> dict[str, Any]:
    """Result of a benchmark by name, with its machine and versions; `engine` as in `serve`.

    Raises:
        UserError: no such benchmark.
    """
    require(name in BENCHES, f"unknown benchmark {name!r}: use one of {', '.join(BENCHES)}")
    from lib.base.model import machine  # imports torch, so a wrong name is reported first

    module = import_module(f"data.evidence.bench_{BENCHES[name]}")
    result: dict[str, Any] = module.engines(engine) if engine else getattr(module, name)()
    return {"machine": machine(), "versions": versions()} | result


def median_and_range(rows: dict[str, list[float]]) -> dict[str, Any]:
    """Median of each row's repeats; under NAME_spread their minimum and maximum."""
    return {key: statistics.median(values) for key, values in rows.items()} | {
        f"{key}_spread": [min(values), max(values)] for key, values in rows.items()}
