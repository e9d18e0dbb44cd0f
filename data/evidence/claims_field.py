"""Rules for claims of the field that neither source makes, F1 and on."""

import torch

from data.evidence.ledger import (
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

RANK, BESIDE = 16, ("lora-4", "lora-64", "qlora-16")


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
