"""Rules for claims of the field that neither source makes: F1 and F2."""

import math
from typing import Any

import torch

from data.evidence.ledger import (
    BATCHES,
    REFUTED,
    SEEDS,
    Judgement,
    Stored,
    of_parts,
    percent,
    points,
    ratio,
    rule,
)
from lib.errors import require

LOWER, RANK, HIGHER = 4, 16, 64
BESIDE = (f"lora-{LOWER}", f"lora-{HIGHER}", f"qlora-{RANK}")


def of_seeds(arm: str) -> list[str]:
    """Pieces of a way to train, seed by seed; the first seed's has no number."""
    return [f"forgetting/{arm}", *(f"forgetting/{arm}-seed-{seed}" for seed in SEEDS[1:])]


@rule("F1", "LoRA learns less and forgets less than full fine-tuning (Biderman et al. 2024).",
      "100 steps on the sensors, full fine-tuning and rank 16 at the best rate of a first sweep, "
      "three seeds; ranks 4, 64 and QLoRA at rank 16's, one seed: right answers of 200, and how "
      "far the next token's distribution on WikiText-2 moves from the untrained model's (KL). The "
      "intervals are over seeds and examples or windows.",
      short="LoRA learns less and forgets less", unit="times the KL",
      needs=[*of_seeds("full"), *of_seeds("lora-16")],
      also=[f"forgetting/{arm}" for arm in BESIDE])
def f1(at: Stored) -> Judgement:
    """Two parts at rank 16, it learns less and it forgets less.

    Refuted if it forgets more, for that is what the claim denies.
    """
    runs = {arm: [at[name]["steps"] for name in of_seeds(arm)] for arm in ("full", "lora-16")}
    ends = {arm: [steps["100"] for steps in rows] for arm, rows in runs.items()}
    learns = points(*([row["test"] for row in ends[arm]] for arm in ("lora-16", "full")))
    moved = {arm: torch.tensor([row["wikitext"]["windows"]["kl"] for row in rows]).double()
             for arm, rows in ends.items()}
    forgets = ratio((moved["lora-16"] / moved["full"]).log())
    less = [None if x is None else not x for x in (learns.shows(), forgets.shows(1))]
    verdict = REFUTED if forgets.above(1) else of_parts(*less)
    on_the_way = "; ".join(
        f"{label} {percent(rows[step]['test']['share'], 0)} right and KL "
        f"{rows[step]['wikitext']['kl']['value']:.2f}"
        for step in ("25", "50") for label, rows in (
            (f"at step {step} LoRA", runs["lora-16"][0]), ("full", runs["full"][0])))
    last = {arm: at[f"forgetting/{arm}"]["steps"]["100"]["wikitext"]["kl"]["value"]
            for arm in BESIDE if at.has(f"forgetting/{arm}")}
    others = ", ".join(f"{arm} {kl:.2f}" for arm, kl in last.items())
    headline = f"LoRA of rank {RANK} forgets {forgets:.2f} times as much (KL), {learns:+.1f} points"
    finding = (f"At rank {RANK} the distribution of the next token moves {forgets:.2f} times as "
               f"far as with full fine-tuning, at {learns:+.1f} points on the task. On the way, "
               f"one seed: {on_the_way}" + (
                   f". KL at the end, one seed each: {others}" if others else ""))
    return Judgement(verdict, headline, finding, forgets.value, forgets.ends)


@rule("F2", "LoRA pays more than full fine-tuning for a large batch, and for a rank below what the "
      "data need (Schulman et al. 2025).",
      "The same 240 examples in 30 steps of 8 and in 6 of 40, LoRA of rank 16 and full "
      "fine-tuning, three seeds, each at the best rate of a grid in factors of two: how many times "
      "the held-out loss of 100 examples grows, over seeds. Ranks 4, 16 and 64 after 100 steps of "
      "16: right answers of 500, one seed.",
      short="LoRA pays for large batches and low ranks", unit="times full fine-tuning's price",
      needs=[*(f"batches_{seed}" for seed in SEEDS), "lora", f"rank_{LOWER}", f"rank_{HIGHER}"])
def f2(at: Stored) -> Judgement:
    """Two parts: a large batch costs LoRA more, and rank 4 has fewer right answers than 16."""
    pieces = [f"batches_{seed}" for seed in SEEDS]
    at.require_one_dtype(*pieces)
    rows = [at[piece] for piece in pieces]
    logs = {name: torch.tensor([math.log(least_loss(row[name])) for row in rows]).double()
            for name in rows[0]}
    price = {mode: logs[f"{mode} {BATCHES[1]}"] - logs[f"{mode} {BATCHES[0]}"]
             for mode in ("lora", "full")}
    lora, full, more = (ratio(x) for x in (*price.values(), price["lora"] - price["full"]))
    low, high = (points([at[f"rank_{rank}"]["test"]], [at["lora"]["test"]])
                 for rank in (LOWER, HIGHER))
    verdict = of_parts(more.shows(1), None if low.shows() is None else not low.shows())
    small, large = BATCHES
    headline = (f"Batch {large}, not {small}: loss x {lora.value:.1f}, full x {full.value:.1f}; "
                f"rank {LOWER}, not {RANK}: {low:+.1f} points")
    finding = (f"At equal examples, batches of {large} instead of {small} give LoRA {lora:.2f} "
               f"times the loss and full fine-tuning {full:.2f} times, so LoRA pays {more:.2f} "
               f"times as much ({len(SEEDS)} seeds). In equal steps, rank {LOWER} is {low:+.1f} "
               f"points from rank {RANK}, and rank {HIGHER} {high:+.1f}, one seed each")
    return Judgement(verdict, headline, finding, more.value, more.ends)


def least_loss(rows: dict[str, Any]) -> float:
    """The loss at the best rate. UserError if that is at an end: a better one may lie beyond."""
    losses = {float(rate): row["validation_loss"] or math.inf for rate, row in rows.items()}
    best = min(losses, key=losses.__getitem__)
    require(min(losses) < best < max(losses), f"The best rate, {best:g}, is at an end of its grid")
    return losses[best]
