"""One adapter over llama.cpp's types against dedicated ones: files of three budgets, scored.

A dedicated adapter is trained, in as many steps, at the configuration that the budget gave the
joint one, and is deployed at that one.
"""

import dataclasses
import functools
import shutil
from typing import Any

from data.evidence.coa import PARTS, RATE, RATE_ALONE, SETTINGS, digest
from data.evidence.ledger import SEEDS
from data.evidence.pieces import WORK, Piece, score_row, served_score
from lib.base.embedded import EMBEDDED
from lib.coa.adapter import train_joint
from lib.deploy.deployment import TASKS, deploy, shipped
from lib.files import write_json

BUDGETS = (80.0, 90.0, 105.0, 150.0)  # MB; the last holds all matrices in Q8_0
FOLDER = WORK / "edge_coa"


def trained(task: str, method: str, seed: int, **changes: Any) -> Any:
    """The folder of an adapter, trained once; a killed run goes on from its checkpoint."""
    out = FOLDER / "-".join(map(str, (task, method, *changes.values(), seed)))
    rate = RATE if method in ("coa", "shared") else RATE_ALONE
    settings = dataclasses.replace(
        SETTINGS, seed=seed, method=method, accumulate=PARTS[task], learning_rate=rate[task],
        formats="nf" if method == "dedicated" else "gguf",
        configuration=str(FOLDER / f"{task}-{changes['budget']:g}.json") if changes else "")
    if not out.is_dir():
        train_joint(TASKS[task]("train"), settings, model=EMBEDDED, out=out, say_every=10)
    return out


def joint(task: str, method: str, seed: int) -> dict[str, Any]:
    """One adapter at all budgets: its right answers of 500, sizes, held-out losses."""
    return _deployed(task, trained(task, method, seed), BUDGETS)


def dedicated(task: str, budget: float, seed: int) -> dict[str, Any]:
    """An adapter of its own for one budget."""
    return _deployed(task, trained(task, "dedicated", seed, budget=budget), (budget,))


def _deployed(task: str, adapter: Any, budgets: tuple[float, ...]) -> dict[str, Any]:
    out, rows = FOLDER / "files", {}
    shutil.rmtree(out, ignore_errors=True)
    given = shipped(task) | {"adapter": adapter, "form": "gguf"}
    done = deploy(budgets=budgets, out=out, **given)
    for budget in budgets:
        one, folder = done[budget], out / f"{budget:g}mb" if len(budgets) > 1 else out
        write_json(FOLDER / f"{task}-{budget:g}.json", one.configuration.to_json())
        score = served_score(folder, TASKS[task]("test", 500))
        rows[f"{budget:g}"] = {
            "mb": one.actual_mb, "bits": one.configuration.bits, "table": str(one.table),
            "configuration": digest([one.configuration]), "held_out_loss": one.loss,
            "test": score_row(score)}
        print(f"  {adapter.name}, {budget:g} MB: {score}", flush=True)
    return rows


PIECES = {
    f"edge-{task}-{method}-{seed}": Piece(f"edge_coa/{task}-{method}-{seed}",
                                          functools.partial(joint, task, method, seed))
    for seed in SEEDS for task in TASKS for method in ("coa", "shared")} | {
    f"edge-{task}-dedicated-{budget:g}-{seed}": Piece(
        f"edge_coa/{task}-dedicated-{budget:g}-{seed}",
        functools.partial(dedicated, task, budget, seed))
    for seed in SEEDS for task in TASKS for budget in BUDGETS[:3]}
