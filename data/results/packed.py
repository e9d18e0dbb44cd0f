"""What `deploy` packs for a budget, read back and scored on the whole test."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.deploy import deploy_packed, load_deployed

# MB, everything counted: as for GGUF of mixed types, and near the smallest of use.
BUDGETS = (80, 65)


def packed(work: Path, score_tests: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """{budget: size, bits a weight, held-out loss, score} of the configuration-aware adapter."""
    rows = {}
    for budget in BUDGETS:
        out = work / f"packed_{budget}"
        shutil.rmtree(out, ignore_errors=True)
        done = deploy_packed("sensors", budget, out, examples=1)
        row = score_tests(load_deployed(out, packed_layers=False))
        rows[str(budget)] = {"mb": done.actual_mb, "bits": done.plan.bits,
                             "embedding": done.embedding, "loss": done.loss} | row
        print(f"  {budget} MB: {done.plan.bits:.2f} bits, {row['test']['share']:.1%}", flush=True)
    return rows
