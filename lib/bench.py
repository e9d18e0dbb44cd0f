"""Benchmarks: ratios measured in one run, several repeats, median and spread."""

from importlib import import_module
from typing import Any

from lib.artifacts import versions
from lib.errors import require

# Each is a function of its name in lib.bench_MODULE.
BENCHES = {name: name for name in ("training", "serving", "switching", "search", "dtypes")
           } | {"targets": "training"}


def run_bench(name: str) -> dict[str, Any]:
    """Result of a benchmark by name, with the machine and the versions it is of.

    Raises:
        UserError: no such benchmark.
    """
    require(name in BENCHES, f"unknown benchmark {name!r}: use one of {', '.join(BENCHES)}")
    from lib.base_model import machine  # seconds: a mistake shows before

    result: dict[str, Any] = getattr(import_module(f"lib.bench_{BENCHES[name]}"), name)()
    return {"machine": machine(), "versions": versions()} | result
