"""Benchmarks: ratios measured in one run, several repeats, median and spread."""

from importlib import import_module
from typing import Any

from lib.errors import require

# Each is a function of that name in lib.bench_NAME.
BENCHES = ("training", "targets", "serving", "switching", "search", "dtypes")


def run_bench(name: str) -> dict[str, Any]:
    """Result of a benchmark by name.

    Raises:
        UserError: no such benchmark.
    """
    require(name in BENCHES, f"unknown benchmark {name!r}: use one of {', '.join(BENCHES)}")
    return getattr(import_module(f"lib.bench_{name}"), name)()
