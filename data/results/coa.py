"""Reference runs of CoA-LoRA: each piece is one training run with its measurements.

`python data/results/coa.py` makes the pieces that are missing, the most telling
first; with names, those. A run that is cut loses one piece.
"""

import dataclasses
import functools
import hashlib
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from alternate import renewed
from make import ADAPTERS, RESULTS, run_pieces, score_row, training_row

from lib.artifacts import BUILD, read_json
from lib.base_model import load_tokenizer
from lib.compare import MAIN
from lib.configuration import Configuration, Layers, Level
from lib.deploy import TASKS
from lib.errors import UserError, require
from lib.joint import train_over
from lib.plans import BUDGETS as SPREAD
from lib.plans import error_table, greedy_plan, random_plan, sensitivities
from lib.profiles import PROFILES, TrainSettings
from lib.scratch import replacing
from lib.surrogate import Features, numbers, plan_of
from lib.switchable import Switchable
from lib.tasks import held_out_loss, keyword_score
from lib.train import TrainResult

COA = RESULTS / "coa"
SEEDS = (0, 1, 2)
SETTINGS = dataclasses.replace(PROFILES["reference"].train, mode="lora", accumulate=2)
# Of the joint methods: the pieces TASK-METHOD-rateRATE-0 sweep over these (none is stored).
RATES = {"sensors": (3e-3, 4.5e-3, 6.5e-3), "movies": (1.5e-3, 3e-3, 4.5e-3)}
RATE = {"sensors": 4.5e-3, "movies": 3e-3}
# Of dedicated adapters, swept at one plan: the pieces TASK-dedicated-rateRATE-0 (none is stored).
ALONE = {"sensors": (1.5e-3, 3e-3, 4.5e-3), "movies": (1e-3, 2e-3, 3e-3)}
RATE_ALONE, SWEPT_AT = {"sensors": 3e-3, "movies": 3e-3}, "greedy 3"
# A step goes through in so many parts, each at a configuration of its own. A film's answer
# is one word: in smaller parts a part's own loss, which scales its gradient, is mostly noise.
PARTS = {"sensors": 4, "movies": 2}
# A plan in use takes 212 MB; more is kept only where memory is not short.
CACHE_MB = 256
# The method "long": "coa" in more steps. The paper reports 2.6 to 2.8 times the time of
# Shared-LoRA for its joint training; ours takes 1.05 times a step, so it can take more of them.
# Its first seed is what the notebooks, `search.py` and `deploy` start from.
LONG = 260
# Of the longer runs. At the films' rate above one of three diverged, which its training loss
# shows (the pieces movies-long-rateRATE-SEED): they have half of it.
LONG_RATE = {"sensors": 4.5e-3, "movies": 1.5e-3}
# Shared-LoRA in as many steps as "long", at its rates: its rival.
LONGER = {"long": "coa", "lora-long": "lora"}
# Search and training in turn: before these steps, so many evaluations on so many examples.
RENEW_AT, EVALUATIONS, HELD = (34, 67), 20, 24
BUDGETS, AT_RANDOM = (2.5, 3.0, 3.5, 4.0), (4.5, 6.0)
# A film's verdict has one word, a machine's answer some forty tokens.
NEW_TOKENS = {"sensors": 56, "movies": 12}
# Nats a token above which a model answers nothing of use: its score is at its floor, and 64
# answers that never end are not waited for. One word is right by luck in half of the films.
HOPELESS = {"sensors": 1.0, "movies": math.inf}


class Stored(Switchable):
    """Levels are built once for all runs, and read from `build/levels` after that.

    Making the levels of a plan takes a second or two of one core. A joint run changes
    its plan some hundred times, among 36, and all runs want the same ones.
    """

    def _build(self, index: int, level: Level) -> Tensor:
        weight = self._linears[index].weight
        kind = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[weight.dtype]
        folder = BUILD / "levels" / f"{self.fingerprint[:12]}-{self.grid}-{kind}"
        path = folder / ("-".join(map(str, (index, *level.as_list()))) + ".bin")
        if path.is_file():
            read = torch.from_numpy(np.fromfile(path, str(kind).removeprefix("torch.")))
            return read.view(weight.dtype).view(weight.shape)
        made = super()._build(index, level)
        with replacing(path) as part:  # another run may make the same one
            made.contiguous().view(kind).numpy().tofile(part)
        return made


def make_plans(task: str) -> dict[str, Any]:
    """Level numbers of the training set, and of the test plans by name.

    Greedy plans weigh the quantisation error by what the plain base's loss
    feels of it on 16 training examples. A plan in which more is felt than in
    the cheapest greedy one, which has fewer bits, is no use to anybody, and
    its steps do harm: it is left out of the training set. The plans are stored, so
    that all runs have the same: gradients differ in their last bits between machines.

    Six test plans have dedicated adapters to compare with: greedy ones at the
    paper's four budgets, and two random ones. Twenty more lie from 2.45 to 6.8
    bits. No test plan is trained on, nor a greedy one near a main budget. Of the
    ten further greedy ones most share nine layers in ten with a training plan.
    """
    base = Switchable.load()
    felt = sensitivities(base, TASKS[task]("train")[:16])
    levels, errors = table = error_table(base, felt)
    starting, rng = starting_set(base, table), random.Random(1000)
    noise = Features.of(base, felt).sums(torch.stack([numbers(p) for p in starting]))[:, 0]
    # Greedy plans of near budgets share most of their layers: none may be near a main one.
    training = [plan for i, plan in enumerate(starting)
                if noise[i] <= noise[1]
                and (i % 2 == 0 or min(abs(plan.bits - b) for b in BUDGETS) > 0.12)]
    tests = {f"greedy {b:g}": greedy_plan(base.layers, b, levels, errors) for b in BUDGETS}
    tests |= {f"random {b:g}": random_plan(base.layers, b, rng) for b in AT_RANDOM}
    for i in range(10):
        budget = 2.45 + 0.48 * i
        tests[f"more greedy {budget:.2f}"] = greedy_plan(base.layers, budget, levels, errors)
        tests[f"more random {budget:.2f}"] = random_plan(base.layers, budget, rng)
    require(tuple(tests)[:len(MAIN)] == MAIN, "the main plans have other names")
    require(not set(tests.values()) & set(training), "a test plan is in the training set")
    return {"sensitivities": felt.tolist(), "training": [*map(text, training)],
            "tests": {name: text(plan) for name, plan in tests.items()}}


def starting_set(base: Switchable, table: tuple[Sequence[Level], Tensor], *,
                 count: int = 50, seed: int = 0) -> list[Configuration]:
    """Configurations spread over the budgets: random and greedy ones in turn.

    Args:
        table: of `error_table`.
    """
    rng = random.Random(seed)
    levels, errors = table
    low, high = SPREAD
    budgets = [low + (high - low) * (i + 0.5) / (count // 2) for i in range(count // 2)]
    greedy = functools.partial(greedy_plan, base.layers, levels=levels, errors=errors)
    pairs = [(random_plan(base.layers, b, rng), greedy(b)) for b in budgets]
    return [plan for pair in pairs for plan in pair]


def text(plan: Configuration) -> str:
    """The plan's level numbers with spaces between, short in a file."""
    return " ".join(map(str, numbers(plan).tolist()))


def plans_of(task: str, layers: Layers) -> tuple[list[Configuration], dict[str, Configuration]]:
    """(training set, test plans by name) of the piece TASK-plans."""
    stored = read_json(COA / f"{task}-plans.json")["result"]

    def plan(row: str) -> Configuration:
        return plan_of(layers, map(int, row.split()))

    return [*map(plan, stored["training"])], {n: plan(r) for n, r in stored["tests"].items()}


def measure(base: Switchable, model: Any, task: str, plans: dict[str, Configuration],
            training: Sequence[Configuration], split: str = "test") -> dict[str, dict[str, Any]]:
    """At each plan the loss of test examples, and at the main ones their answers, too.

    Losses are kept for every ten examples (100 at the main plans, else 50), so
    that two adapters are compared on the same ones. A hopeless model is not
    scored. `trained_share` is the share of layers that the nearest training plan
    has at the same level.
    """
    tokenizer, rows, test = load_tokenizer(), {}, TASKS[task](split, 100)
    for name, plan in plans.items():
        base.switch(plan)
        count = len(test) if name in MAIN else 50
        losses = [held_out_loss(model, tokenizer, test[i:i + 10]) for i in range(0, count, 10)]
        rows[name] = {"plan": digest([plan]), "bits": plan.bits,
                      "trained_share": max(map(functools.partial(shared, plan), training)),
                      "loss": statistics.mean(losses), "losses": losses}
        if name in MAIN and rows[name]["loss"] < HOPELESS[task]:
            score = keyword_score(model, tokenizer, test[:64], max_new_tokens=NEW_TOKENS[task])
            rows[name]["score"] = score_row(score)
        print(f"    {name}: loss {rows[name]['loss']:.4f}", flush=True)
    return rows


def shared(plan: Configuration, other: Configuration) -> float:
    """Share of layers at the same level."""
    return statistics.mean(a == b for a, b in zip(plan.levels, other.levels, strict=True))


def digest(plans: Sequence[Configuration]) -> str:
    """Short SHA-256 of configurations, to compare only runs of the same ones."""
    text = json.dumps([plan.to_json() for plan in plans])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def joint(task: str, method: str, seed: int, rate: float = 0.0) -> dict[str, Any]:
    """One adapter over the training set, at all test plans.

    Methods are those of `train_over`, those of LONGER, and "alternated": "coa" with a
    search between its steps. A `rate` is one of a sweep: by validation examples, since
    what a setting is chosen by is not what it is judged by. No sweep has "long".
    """
    base = Stored.load(cache_mb=CACHE_MB)
    training, tests = plans_of(task, base.layers)
    longer = method in LONGER
    swept = rate and not longer
    settings = dataclasses.replace(
        SETTINGS, seed=seed, accumulate=PARTS[task], steps=LONG if longer else SETTINGS.steps,
        learning_rate=rate or (LONG_RATE if longer else RATE)[task])
    begun = time.monotonic()
    turns = {}
    if method == "alternated":
        felt = torch.tensor(read_json(COA / f"{task}-plans.json")["result"]["sensitivities"])
        turns = {"renew_at": RENEW_AT, "renew": functools.partial(
            renewed, features=Features.of(base, felt), seed=seed, evaluations=EVALUATIONS,
            held=TASKS[task]("validation", HELD))}
    run, coa = train_over(base, TASKS[task]("train"), training, settings, say_every=10,
                          method=(LONGER | {"alternated": "coa"}).get(method, method), **turns)
    whole = time.monotonic() - begun
    if (method, seed, rate) == ("long", 0, 0.0):
        coa.save_pretrained(ADAPTERS / f"{task}_coa", dtype=torch.float16)
    if swept:
        tests = {name: tests[name] for name in MAIN}
    return _row(run, settings, training) | {
        "with_start_s": round(whole, 1),
        "plans": measure(base, run.model, task, tests, training,
                         "validation" if swept else "test")}


def dedicated(task: str, method: str, seed: int, name: str, rate: float = 0.0) -> dict[str, Any]:
    """One adapter for one plan, at that plan."""
    base = Stored.load(cache_mb=CACHE_MB)
    plan = plans_of(task, base.layers)[1][name]
    settings = dataclasses.replace(SETTINGS, seed=seed, learning_rate=rate or RATE_ALONE[task])
    run, _ = train_over(base, TASKS[task]("train"), [plan], settings, say_every=10,
                        method=method)
    return _row(run, settings, [plan]) | {
        "plans": measure(base, run.model, task, {name: plan}, [plan],
                         "validation" if rate else "test")}


def untrained(task: str) -> dict[str, Any]:
    """The quantised base alone, at all test plans: the floor."""
    base = Stored.load(cache_mb=CACHE_MB)
    training, tests = plans_of(task, base.layers)
    return {"plans": measure(base, base.model, task, tests, training)}


def _row(run: TrainResult, settings: TrainSettings, plans: Sequence[Configuration]
         ) -> dict[str, Any]:
    return training_row(run, settings) | {"training_plans": digest(plans)}


def pieces() -> dict[str, Callable[[], dict[str, Any]]]:
    """All pieces by name, the most telling first."""
    every: dict[str, Callable[[], dict[str, Any]]] = {
        f"{task}-plans": functools.partial(make_plans, task) for task in TASKS}
    for seed in SEEDS:
        for task in TASKS:
            for method in ("coa", "lora"):
                every[f"{task}-{method}-{seed}"] = (
                    lambda t=task, m=method, s=seed: joint(t, m, s))
        for task in TASKS:
            for name in MAIN:
                every[f"{task}-dedicated-{name.replace(' ', '-')}-{seed}"] = (
                    lambda t=task, s=seed, n=name: dedicated(t, "lora", s, n))
        for method in (*LONGER, "paper"):
            for task in TASKS:
                every[f"{task}-{method}-{seed}"] = (
                    lambda t=task, m=method, s=seed: joint(t, m, s))
        if seed == 0:
            for task in TASKS:
                for rate in RATES[task]:
                    for method in ("coa", "lora"):
                        every[f"{task}-{method}-rate{rate:g}-0"] = (
                            lambda t=task, m=method, r=rate: joint(t, m, 0, r))
                for rate in ALONE[task]:
                    every[f"{task}-dedicated-rate{rate:g}-0"] = (
                        lambda t=task, r=rate: dedicated(t, "lora", 0, SWEPT_AT, r))
            for task in TASKS:
                every[f"{task}-base"] = lambda t=task: untrained(t)
                every[f"{task}-alternated-0"] = lambda t=task: joint(t, "alternated", 0)
                for name in MAIN[:len(BUDGETS)]:
                    every[f"{task}-lq-{name.replace(' ', '-')}-0"] = (
                        lambda t=task, n=name: dedicated(t, "lq", 0, n))
    every |= {f"movies-long-rate{RATE['movies']:g}-{seed}": functools.partial(
        joint, "movies", "long", seed, RATE["movies"]) for seed in SEEDS}
    return every


if __name__ == "__main__":
    try:
        run_pieces(sys.argv[1:], pieces(), results=COA, script="coa.py")
    except UserError as error:
        sys.exit(f"error: {error}")
