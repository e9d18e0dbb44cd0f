"""What `deploy` packs for a budget, read back and scored on the whole test."""

import shutil
from pathlib import Path
from typing import Any

from data.evidence.pieces import score_tests
from lib.deploy.deployment import deploy, shipped
from lib.deploy.packed import load_deployed

# MB, all files counted: as for GGUF of mixed types, and near the smallest useful size.
BUDGETS = (80, 65)


def packed(work: Path) -> dict[str, Any]:
    """{budget: size, bits a weight, held-out loss, score} of the configuration-aware adapter."""
    rows = {}
    for budget in BUDGETS:
        out = work / f"packed_{budget}"
        shutil.rmtree(out, ignore_errors=True)
        deployed = deploy(budgets=[budget], out=out, **shipped("sensors"))[budget]
        row = score_tests(load_deployed(out))
        rows[str(budget)] = row | {
            "mb": deployed.actual_mb, "bits": deployed.configuration.bits,
            "embedding": str(deployed.table), "loss": deployed.loss}
        print(f"  {budget} MB: {deployed.configuration.bits:.2f} bits, {row['test']['share']:.1%}",
              flush=True)
    return rows
