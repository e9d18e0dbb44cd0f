"""Training runs of CoA-LoRA and its rivals: each piece is one run with its measurements.

The most telling come first, so a run of all that is cut off has those. It loses one piece.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from data.evidence.alternate import Renewing, StartFromError, distilling
from data.evidence.compare import MAIN
from data.evidence.ledger import SEEDS
from data.evidence.pieces import ADAPTERS, RESULTS, Piece, score_row, training_row
from lib.base.model import best_dtype, load_tokenizer
from lib.coa.adapter import train_over
from lib.coa.configuration import (
    Configuration,
    Layers,
    Switchable,
    best_formats,
    format_errors,
    greedy_configuration,
    random_configuration,
    sensitivities,
)
from lib.coa.pareto import HIGH, LOW, Features
from lib.deploy.deployment import TASKS
from lib.errors import require
from lib.evaluate.scores import held_out_loss, keyword_score
from lib.files import BUILD, read_json, replacing, writing
from lib.quantize.formats import Format
from lib.quantize.merging import merge
from lib.settings import PROFILES, TrainSettings
from lib.train.training import TrainResult

COA = RESULTS / "coa"
SETTINGS = dataclasses.replace(PROFILES["reference"].train, mode="lora", accumulate=2)
# Learning rates of the joint methods: the pieces TASK-METHOD-rateRATE-0 try these (none is stored).
RATES = {"sensors": (3e-3, 4.5e-3, 6.5e-3), "movies": (1.5e-3, 3e-3, 4.5e-3)}
RATE = {"sensors": 4.5e-3, "movies": 3e-3}
# Those of dedicated adapters, tried at one configuration: the pieces TASK-dedicated-rateRATE-0
# (none is stored).
ALONE = {"sensors": (1.5e-3, 3e-3, 4.5e-3), "movies": (1e-3, 2e-3, 3e-3)}
RATE_ALONE, SWEPT_AT = {"sensors": 3e-3, "movies": 3e-3}, "greedy 3"
# Parts of a step, each at its own configuration. The answer for a film is one word: in smaller
# parts the loss of a part, which scales its gradient, would be mostly noise.
PARTS = {"sensors": 4, "movies": 2}
# A configuration in use takes 212 MB; more is cached only where memory is not short.
CACHE_MB = 256
# The method "long" is "coa" in more steps. The paper reports 2.6 to 2.8 times the time of
# Shared-LoRA for its joint training. A step of ours takes 1.05 times as long, so we can afford
# more steps. The notebooks, the searches and `deploy` start from its first seed.
LONG = 260
# Rates of the longer runs. At the movies' rate above one of three diverged, as its training loss
# shows (the pieces movies-long-rateRATE-SEED), so they have half of it.
LONG_RATE = {"sensors": 4.5e-3, "movies": 1.5e-3}
# Shared-LoRA with the steps and rates of "long" is the rival of "long".
LONGER = {"long": "coa", "lora-long": "shared"}
# Names of pieces that are not those of `train_over`.
VARIANTS = {"alternated": "coa", "distilled": "coa", "lora": "shared"}
# Search and training in turn: a search before each of these steps, with so many evaluations on
# so many examples.
RENEW_AT, EVALUATIONS, HELD = (34, 67), 20, 24
BUDGETS, AT_RANDOM = (2.5, 3.0, 3.5, 4.0), (4.5, 6.0)
# The verdict on a film is one word, a diagnosis some forty tokens.
NEW_TOKENS = {"sensors": 56, "movies": 12}
# Above this loss, in nats a token, a model answers nothing useful. Its score would be zero, so we
# do not wait for 64 answers that never end. For films one word is right by luck half of the time.
UNSCORED_ABOVE = {"sensors": 1.0, "movies": math.inf}


class CachedOnDisk(Switchable):
    """Weights in each format are built once for all runs, and then read from `build/levels`.

    Building the weights of a configuration takes a second or two of one core. A joint run
    changes its configuration some hundred times, among 36, and all runs need the same ones.
    """

    def _cached(self, index: int, fmt: Format) -> Tensor:
        if (index, fmt) not in self._cache:
            self._cache[index, fmt] = self._stored(index, fmt)
        return super()._cached(index, fmt)

    def _stored(self, index: int, fmt: Format) -> Tensor:
        weight = self._linears[index].weight
        storage = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[weight.dtype]
        folder = BUILD / "levels" / f"{self.fingerprint[:12]}-{storage}"
        path = folder / ("-".join(map(str, (index, *dataclasses.astuple(fmt)))) + ".bin")
        if path.is_file():
            data = torch.from_numpy(np.fromfile(path, str(storage).removeprefix("torch.")))
            return data.view(weight.dtype).view(weight.shape)
        built = self.weight(index, fmt).to(weight)
        with replacing(path) as part:  # another run may build the same one
            built.contiguous().view(storage).numpy().tofile(part)
        return built


def make_plans(task: str) -> dict[str, Any]:
    """The training set of configurations, and the test configurations by name.

    Greedy ones weigh the quantisation error by its effect on the plain base's loss, from 16
    training examples. A configuration with more of that noise than the cheapest greedy one,
    which has fewer bits, is useless, and its steps do harm: it is left out of the training set.
    The configurations are stored so that all runs have the same ones. Gradients, and with them
    the greedy choice, differ in their last bits between machines.

    Six test configurations have dedicated adapters to compare with: greedy ones at the paper's
    four budgets, and two random ones. Twenty more lie from 2.45 to 6.8 bits. None of them is
    trained on, nor is a greedy one near a main budget. Of the ten further greedy ones most share
    nine layers in ten with a configuration of the training set.
    """
    base = Switchable.load()
    felt = sensitivities(base, TASKS[task]("train")[:16])
    formats = best_formats()
    errors = format_errors(base, formats) * felt[:, None]
    starting, rng = starting_set(base, errors), random.Random(1000)
    noise = Features.of(base, felt).sums(torch.stack([c.numbers for c in starting]))[:, 0]
    # Greedy configurations at near budgets share most of their layers, so none may be near a
    # main budget.
    training = [configuration for i, configuration in enumerate(starting)
                if noise[i] <= noise[1]
                and (i % 2 == 0 or min(abs(configuration.bits - b) for b in BUDGETS) > 0.12)]
    greedy = functools.partial(greedy_configuration, base.layers, formats=formats, errors=errors)
    tests = {f"greedy {b:g}": greedy(b) for b in BUDGETS}
    tests |= {f"random {b:g}": random_configuration(base.layers, b, rng) for b in AT_RANDOM}
    for i in range(10):
        budget = 2.45 + 0.48 * i
        tests[f"more greedy {budget:.2f}"] = greedy(budget)
        tests[f"more random {budget:.2f}"] = random_configuration(base.layers, budget, rng)
    require(tuple(tests)[:len(MAIN)] == MAIN, "the main configurations have other names")
    require(not set(tests.values()) & set(training),
            "a test configuration is in the training set")
    return {"sensitivities": felt.tolist(), "training": [*map(text, training)],
            "tests": {name: text(configuration) for name, configuration in tests.items()}}


def starting_set(base: Switchable, errors: Tensor, *, count: int = 50, seed: int = 0
                 ) -> list[Configuration]:
    """Configurations spread over the budgets, random and greedy ones in turn.

    Args:
        errors: of the `best_formats`, (layers, formats).
    """
    rng, starting = random.Random(seed), []
    for i in range(count // 2):
        budget = LOW + (HIGH - LOW) * (i + 0.5) / (count // 2)
        starting.append(random_configuration(base.layers, budget, rng))
        starting.append(greedy_configuration(base.layers, budget, best_formats(), errors))
    return starting


def text(configuration: Configuration) -> str:
    """A configuration's JSON without spaces: one short line in a file."""
    return json.dumps(configuration.to_json(), separators=(",", ":"))


def plans_of(task: str, layers: Layers) -> tuple[list[Configuration], dict[str, Configuration]]:
    """(training set, test configurations by name) of the piece TASK-plans."""
    stored = read_json(COA / f"{task}-plans.json")["result"]

    def configuration(row: str) -> Configuration:
        return Configuration.from_json(json.loads(row), layers)

    return [*map(configuration, stored["training"])], {
        name: configuration(row) for name, row in stored["tests"].items()}


def measure(base: Switchable, model: Any, task: str, tests: dict[str, Configuration],
            training: Sequence[Configuration], split: str = "test") -> dict[str, dict[str, Any]]:
    """The loss of test examples at each configuration, and at the main ones the answers, too.

    Losses are stored for every ten examples (100 at the main configurations, 50 elsewhere), so
    that two adapters are compared on the same ones. A hopeless model is not scored.
    `trained_share` is the share of layers in which the nearest training configuration has the
    same format.
    """
    tokenizer, rows, examples = load_tokenizer(), {}, TASKS[task](split, 100)
    for name, configuration in tests.items():
        base.switch(configuration)
        count = len(examples) if name in MAIN else 50
        losses = [held_out_loss(model, tokenizer, examples[i:i + 10]) for i in range(0, count, 10)]
        rows[name] = {"plan": digest([configuration]), "bits": configuration.bits,
                      "trained_share": max(shared(configuration, other) for other in training),
                      "loss": statistics.mean(losses), "losses": losses}
        if name in MAIN and rows[name]["loss"] < UNSCORED_ABOVE[task]:
            score = keyword_score(model, tokenizer, examples[:64],
                                  max_new_tokens=NEW_TOKENS[task])
            rows[name]["score"] = score_row(score)
        print(f"    {name}: loss {rows[name]['loss']:.4f}", flush=True)
    return rows


def shared(one: Configuration, other: Configuration) -> float:
    """Share of layers in the same format."""
    return statistics.mean(a == b for a, b in zip(one.formats, other.formats, strict=True))


def digest(configurations: Sequence[Configuration]) -> str:
    """Short SHA-256 of configurations, so that only runs of the same ones are compared."""
    data = json.dumps([configuration.to_json() for configuration in configurations])
    return hashlib.sha256(data.encode()).hexdigest()[:12]


def joint(task: str, method: str, seed: int, rate: float = 0.0) -> dict[str, Any]:
    """One adapter over the training set, at all test configurations.

    Methods are those of `train_over`, those of LONGER, "lora" (shared), and two variants of "coa":
    "alternated", with a search between its steps, and "distilled", from the unquantised model that
    has the task's QLoRA adapter. A `rate` belongs to a sweep, which is measured on validation
    examples: a setting must not be chosen by the examples that judge it. "long" is in no sweep.
    """
    base = CachedOnDisk.load(cache_mb=CACHE_MB)
    training, tests = plans_of(task, base.layers)
    longer = method in LONGER
    swept = rate and not longer
    settings = dataclasses.replace(
        SETTINGS, seed=seed, accumulate=PARTS[task], steps=LONG if longer else SETTINGS.steps,
        learning_rate=rate or (LONG_RATE if longer else RATE)[task])
    start = time.monotonic()
    callbacks = []
    if method == "alternated":
        felt = torch.tensor(read_json(COA / f"{task}-plans.json")["result"]["sensitivities"])
        callbacks = [Renewing(base, training, seed, at=RENEW_AT, evaluations=EVALUATIONS,
                              features=Features.of(base, felt),
                              held=TASKS[task]("validation", HELD))]
    learning = contextlib.nullcontext()
    if method == "distilled":
        learning = distilling(merge(**teacher(task)).to(best_dtype()))
    with learning:
        run, coa = train_over(base, TASKS[task]("train"), training, settings, say_every=10,
                              method=(LONGER | VARIANTS).get(method, method),
                              callbacks=callbacks)
    whole = time.monotonic() - start
    if (method, seed, rate) == ("long", 0, 0.0):
        with writing(ADAPTERS / f"{task}_coa", **coa.facts) as part:
            coa.write(part)
            halves = {name: tensor.half() for name, tensor in coa.factors().items()}
            save_file(halves, part / "adapter_model.safetensors")
    if swept:
        tests = {name: tests[name] for name in MAIN}
    return _row(run, settings, training) | {
        "with_start_s": round(whole, 1),
        "plans": measure(base, run.model, task, tests, training,
                         "validation" if swept else "test")}


def teacher(task: str) -> dict[str, Any]:
    """The unquantised model that has learned a task, as `merge` takes it."""
    return {"adapter": ADAPTERS / f"{task}_qlora", "route": "dequantized"}


def dedicated(task: str, seed: int, name: str, *, rate: float = 0.0, from_error: bool = False
              ) -> dict[str, Any]:
    """One adapter for one configuration, at that configuration."""
    base = CachedOnDisk.load(cache_mb=CACHE_MB)
    configuration = plans_of(task, base.layers)[1][name]
    settings = dataclasses.replace(SETTINGS, seed=seed, learning_rate=rate or RATE_ALONE[task])
    records = TASKS[task]("train")
    callbacks = [StartFromError(base, configuration, records)] if from_error else []
    run, _ = train_over(base, records, [configuration], settings, say_every=10, method="dedicated",
                        callbacks=callbacks)
    return _row(run, settings, [configuration]) | {
        "plans": measure(base, run.model, task, {name: configuration}, [configuration],
                         "validation" if rate else "test")}


def untrained(task: str) -> dict[str, Any]:
    """The quantised base alone, at all test configurations: the floor."""
    base = CachedOnDisk.load(cache_mb=CACHE_MB)
    training, tests = plans_of(task, base.layers)
    return {"plans": measure(base, base.model, task, tests, training)}


def _row(run: TrainResult, settings: TrainSettings, configurations: Sequence[Configuration]
         ) -> dict[str, Any]:
    return training_row(run, settings) | {"training_plans": digest(configurations)}


def pieces() -> dict[str, Piece]:
    """All pieces by name, the most telling first."""
    every: dict[str, Piece] = {}

    def add(name: str, make: Any, *args: Any, **options: Any) -> None:
        every[name] = Piece(f"coa/{name}", functools.partial(make, *args, **options))

    for task in TASKS:
        add(f"{task}-plans", make_plans, task)
    for seed in SEEDS:
        for task in TASKS:
            for method in ("coa", "lora"):
                add(f"{task}-{method}-{seed}", joint, task, method, seed)
        for task in TASKS:
            for name in MAIN:
                add(f"{task}-dedicated-{name.replace(' ', '-')}-{seed}",
                    dedicated, task, seed, name)
        for method in (*LONGER, "paper"):
            for task in TASKS:
                add(f"{task}-{method}-{seed}", joint, task, method, seed)
        if seed == 0:
            add_single_runs(add)
    for seed in SEEDS:
        rate = RATE["movies"]
        add(f"movies-long-rate{rate:g}-{seed}", joint, "movies", "long", seed, rate)
        add(f"movies-distilled-{seed}", joint, "movies", "distilled", seed)
    return every


def add_single_runs(add: Any) -> None:
    """Sweeps and further methods, with one seed."""
    for task in TASKS:
        for rate in RATES[task]:
            for method in ("coa", "lora"):
                add(f"{task}-{method}-rate{rate:g}-0", joint, task, method, 0, rate)
        for rate in ALONE[task]:
            add(f"{task}-dedicated-rate{rate:g}-0", dedicated, task, 0, SWEPT_AT, rate=rate)
    for task in TASKS:
        add(f"{task}-base", untrained, task)
        add(f"{task}-alternated-0", joint, task, "alternated", 0)
        for name in MAIN[:len(BUDGETS)]:
            add(f"{task}-lq-{name.replace(' ', '-')}-0", dedicated, task, 0, name,
                from_error=True)


PIECES = pieces()
