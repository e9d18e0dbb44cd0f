"""Rules for the paper's claims, P1 to P5: stored runs of coa.py, search.py, `switching`.

A verdict needs all seeds. It is made over the tasks whose runs are all there: of sensors
at least, of both when the films' are made. Tasks that differ make it "corrected".
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ledger import (
    CORRECTED,
    FEW_BITS,
    NOT_YET,
    REFUTED,
    REPRODUCED,
    SEEDS,
    Found,
    Interval,
    Stored,
    few_at_random,
    hits,
    percent,
    ratio,
    rule,
    spread,
)

from lib.compare import MAIN, Compared, compare_losses, compare_scores, log_ratios, pairs
from lib.errors import require
from lib.measure import paired_interval

# What a stored run measured, by plan.
Plans = dict[str, Any]
TASKS = ("sensors", "movies")
# A model is of use where it is clearly more often right than wrong: a constant answer
# is right in half of the films, and nearly never for a machine.
USEFUL = 0.5
# Nats a token; a guess among all tokens has about eleven, a trained adapter far less than one.
HOPELESS = 1.0
# Losses that differ by less match.
MATCH_LOSS, MATCH_POINTS = 1.1, 2.0
# A share of a training run that is as good as nothing.
NOTHING = 0.01
# A pass that costs so much more, at most, is as good as free.
FREE = 0.02
OURS = "CoA-LoRA with a change of ours (components that 2-bit layers own)"
METHODS, SEARCHES = ("ours", "random", "nsga2"), (0, 1, 2, 3, 4)


def joint(task: str, *methods: str) -> list[str]:
    """Pieces of adapters that were made for all plans at once."""
    return [f"coa/{task}-{method}-{seed}" for method in methods for seed in SEEDS]


# The same in more steps: P1 and P2 say what they give, P5 what they give to both.
LONGER = [name for task in TASKS for name in joint(task, "long")]
LONGER_SHARED = [name for task in TASKS for name in joint(task, "lora-long")]


def dedicated(task: str, *seeds: int) -> list[str]:
    """Pieces of adapters that were made for one plan each."""
    return [f"coa/{task}-dedicated-{plan.replace(' ', '-')}-{seed}"
            for seed in seeds for plan in MAIN]


def p1_pieces(task: str) -> list[str]:
    """What P1 needs of a task."""
    return [*joint(task, "coa"), f"coa/{task}-base"]


def p2_pieces(task: str) -> list[str]:
    """What P2 needs of a task."""
    return [*joint(task, "coa"), *dedicated(task, *SEEDS)]


def p5_pieces(task: str) -> list[str]:
    """What P5 needs of a task."""
    return joint(task, "coa", "lora")


def ready(at: Stored, pieces: Callable[[str], list[str]]) -> list[str]:
    """Tasks whose pieces are all there."""
    return [task for task in TASKS if at.has(*pieces(task))]


def require_alike(at: Stored, names: Sequence[str]) -> None:
    """UserError unless the joint runs were trained over the same plans."""
    digests = {at[name].get("training_plans") for name in names}
    require(len(digests) == 1, "joint runs were trained over different plans: run them again")


def over_tasks(verdicts: Sequence[str]) -> str:
    """One verdict: that of all tasks, or "corrected" where they differ."""
    return verdicts[0] if len(set(verdicts)) == 1 else CORRECTED


def interval(found: Compared) -> Interval:
    """A stored comparison in the ledger's form."""
    return Interval(found.value, found.low, found.high)


def compared(at: Stored, task: str, one: str, other: str, plans: Sequence[str] = MAIN
             ) -> tuple[Interval, Interval | None]:
    """Loss ratio (below 1: the first is better) and difference of scores in points."""
    losses = compare_losses(task, one, other, plans, at.folder / "coa")
    scores = compare_scores(task, one, other, MAIN, at.folder / "coa")
    require(losses, f"{task}: {one} and {other} have no seed in common at all these plans")
    return interval(losses), scores and interval(scores)


def every_plan(at: Stored, task: str) -> dict[str, Any]:
    """The main plans and those between, with what was measured in the first seed."""
    return at[joint(task, "coa")[0]]["plans"]


def in_words(task: str, losses: Interval, scores: Interval | None) -> str:
    """A comparison as a finding says it."""
    points = f", {scores:+.1f} points" if scores else ", scores at floor or ceiling"
    return f"{task}: {losses:.2f} times the loss{points}"


def longer_too(at: Stored, task: str, rival: str, plans: Sequence[str] = MAIN) -> str:
    """What more joint steps give against a rival, in words."""
    steps, others = (len(at[f"coa/{task}-{method}-0"]["losses"]) for method in ("long", "coa"))
    said = in_words(task, *compared(at, task, "long", rival, plans))
    seeds = sum(at.has(name) for name in joint(task, "long"))
    return f"in {steps / others:.1f} times the steps ({seeds} of {len(SEEDS)} seeds) {said}"


def longer_shared(at: Stored, task: str) -> str:
    """What more steps give to both joint ways, in words."""
    both = "long", "lora-long"
    require_alike(at, joint(task, *both))
    return (f"; both {longer_too(at, task, both[1], [*every_plan(at, task)])} "
            f"(loss {middle_plan(at, task, *both):.2f} at the median plan, "
            f"{at_these_plans(at, task, *both):.2f} with the plans held fixed)")


def middle_plan(at: Stored, task: str, one: str, other: str) -> float:
    """The ratio of losses that half of all plans are above: few broken plans do not move it."""
    return statistics.median(compare_losses(task, one, other, [plan], at.folder / "coa").value
                             for plan in every_plan(at, task))


def at_these_plans(at: Stored, task: str, one: str, other: str) -> Interval:
    """The ratio of losses at all plans as they are: other intervals are for other plans, too."""
    found = pairs(task, one, other, [*every_plan(at, task)], at.folder / "coa")
    return ratio(log_ratios(found).mean(1))


def over_base(rows: Sequence[Plans], base: Plans) -> tuple[dict[str, Interval], Interval]:
    """Share of right answers at each main plan, and the loss over the bare base's at all plans.

    A seed that was not scored at a plan, because its loss was hopeless, has none right there.
    """
    shares = {}
    for plan in MAIN:
        scores = [row[plan].get("score") for row in rows]
        nothing = {"hits": "0" * max(len(s["hits"]) if s else 1 for s in scores)}
        shares[plan] = Interval(*(min(1.0, max(0.0, x)) for x in paired_interval(
            torch.stack([hits(s or nothing) for s in scores]))))
    return shares, ratio(log_ratios([[(row[p], base[p]) for p in base] for row in rows]))


@rule("P1", "One adapter serves any configuration of bits without retraining.",
      f"{OURS} at plans that it never trained on, three seeds: right answers at the six main "
      "ones (of use: clearly more than half), the loss over the bare base's at all 26, and the "
      "largest of them.", unit="% of the main plans", needs=p1_pieces("sensors"),
      also=[*p1_pieces("movies"), *LONGER])
def p1(at: Stored) -> Found:
    """Reproduced if of use at every main plan, hopeless at none, and better than the bare base.

    Corrected if of use at some. The verdict is of the 100 steps that both tasks have.
    """
    tasks = ready(at, p1_pieces)
    verdicts, said, good = zip(*(of_use(at, task, "coa") for task in tasks), strict=True)
    longer = [of_use(at, task, "long")[1] for task in tasks if at.has(*joint(task, "long"))]
    return Found(over_tasks(verdicts), "; ".join([*said, *longer]),
                 100 * sum(good) / (len(MAIN) * len(tasks)))


def of_use(at: Stored, task: str, method: str) -> tuple[str, str, int]:
    """P1's verdict on one way of training, in words, and the count of plans where it is of use."""
    runs = [at[name] for name in joint(task, method)]
    rows, base = [run["plans"] for run in runs], at[f"coa/{task}-base"]["plans"]
    require_alike(at, joint(task, method))
    require(all(row[plan]["plan"] == base[plan]["plan"] for row in rows for plan in base),
            f"{task}: {method} and base were measured at different plans: run them again")
    shares, times = over_base(rows, base)
    worst, where = max((row[plan]["loss"], plan) for row in rows for plan in row)
    good = [plan for plan, share in shares.items() if share.above(USEFUL)]
    every = len(good) == len(shares)
    verdict = (REPRODUCED if every and times.below(1) and worst < HOPELESS else
               CORRECTED if good and times.below(1) else REFUTED)
    each = ", ".join(f"{plan} bits {100 * share.value:.0f} [{100 * share.low:.0f}, "
                     f"{100 * share.high:.0f}] %" for plan, share in shares.items())
    return verdict, (f"{task}, after {len(runs[0]['losses'])} steps: of use at {len(good)} of "
                     f"{len(shares)} main plans ({each}), {times:.2g} times the bare base's "
                     f"loss, at worst {worst:.1f} nats ({where} bits)"), len(good)


@rule("P2", "It matches or beats adapters tuned for each configuration.",
      f"{OURS} against an adapter of its own for each of six plans: the same steps, seeds and "
      "examples, at rates set beforehand, whose sweeps are not stored (a joint step takes four "
      "parts, of films two, each at another plan, and the logarithm of their losses); points at "
      "plans where not all of both answer right or none. Longer runs of films have half the rate: "
      "at the same one of three diverged.",
      unit="times the loss",
      needs=p2_pieces("sensors"),
      also=[*p2_pieces("movies"), *LONGER])
def p2(at: Stored) -> Found:
    """Reproduced if it matches in both, refuted if worse in both; anything else corrects.

    It matches where the whole interval says that it is at most a tenth worse in loss,
    at most 2 points in score.
    """
    found, verdicts = {}, []
    for task in ready(at, p2_pieces):
        require_alike(at, joint(task, "coa"))
        losses, scores = found[task] = compared(at, task, "coa", "dedicated")
        worse = [losses.above(1), scores.below() if scores else losses.above(1)]
        match = [losses.high <= MATCH_LOSS, not scores or scores.low >= -MATCH_POINTS]
        verdicts.append(REPRODUCED if all(match) else REFUTED if all(worse) else CORRECTED)
    longer = [f"; {longer_too(at, task, 'dedicated')}" for task in found
              if at.has(f"coa/{task}-long-0")]
    losses = found["sensors"][0]
    return Found(over_tasks(verdicts), "Against dedicated adapters, in as many steps, " + "; ".join(
        in_words(task, *pair) for task, pair in found.items()) + "".join(longer),
        losses.value, losses.ends)


@rule("P3", "A new configuration takes no additional time.",
      "Seconds to build a plan never seen and its adapter, against training one; a token's "
      "pass with the made adapter, and a joint training step, against plain ones, in turn.",
      unit="s", needs=["switching", "lora"])
def p3(at: Stored) -> Found:
    """Reproduced if a pass costs nothing and a new plan under 1 % of a training run."""
    row, train = at["switching"], at["lora"]["seconds"]
    build, fold = spread(row, "new_configuration_s"), spread(row, "materialise_s")
    late = spread(row, "latency_overhead")
    free = not late.above() and late.high <= FREE
    quick = (build.value + fold.value) / train < NOTHING
    verdict = REPRODUCED if free and quick else CORRECTED if free or quick else REFUTED
    once = spread(row, "step_ratio")
    return Found(verdict, f"Weights of a new plan take {build:.1f} s and its adapter {fold:.2f} s, "
                 f"training one {train:.0f} s; the time of a pass differs by "
                 f"{percent(late.value)} [{percent(late.low)}, {percent(late.high)}]; "
                 "a step of the one joint training, among kept configurations, takes "
                 f"{once:.2f} times a plain one's time",
                 build.value + fold.value, (build.low + fold.low, build.high + fold.high))


@rule("P4", "The set of configurations matters, and the Pareto search improves it.",
      "Hypervolume after equal evaluations from the same start, five seeds (in ours greedy plans "
      "compete, and the first two of five go to ranges of bits that are still empty), as two "
      "samples: the luck of the search, with one adapter, one start, one task; held-out "
      "loss after search and training in turn.", unit="hypervolume (bits x log loss)",
      needs=[f"search/{method}-{seed}" for method in METHODS for seed in SEARCHES],
      also=[f"coa/{task}-alternated-0" for task in TASKS])
def p4(at: Stored) -> Found:
    """Reproduced if it beats random plans and NSGA-II; refuted if one beats it, or nothing is won.

    All must begin at one start, so the evaluations are equal and the volumes comparable.
    """
    rows = {m: [at[f"search/{m}-{seed}"] for seed in SEARCHES] for m in METHODS}
    starts = {(r["without_search"], r["start"], len(r["hypervolumes"]), *r["reference"])
              for some in rows.values() for r in some}
    if len(starts) > 1:
        return Found(NOT_YET, "The searches had different starts or lengths: run them again")
    volume = {m: torch.tensor([r["hypervolume"] for r in some], dtype=torch.float64)
              for m, some in rows.items()}
    # A seed draws other things in another method, so nothing is paired: each with each has the
    # variance of both means, and Welch's degrees of freedom.
    over = {m: Interval(*paired_interval(volume["ours"][:, None] - volume[m]))
            for m in METHODS[1:]}
    gain = Interval(*paired_interval(volume["ours"] - rows["ours"][0]["without_search"]))
    verdict = (REPRODUCED if all(x.above() for x in over.values()) else
               REFUTED if any(x.below() for x in over.values()) or not gain.above() else CORRECTED)
    turns = ["; in turn with training, one seed, losses at all plans and "
             "points at the six main ones, "
             + in_words(task, *compared(at, task, "alternated", "coa", [*every_plan(at, task)]))
             for task in TASKS if at.has(f"coa/{task}-alternated-0", f"coa/{task}-coa-0")]
    return Found(verdict, f"The search adds {gain:.3f} to {rows['ours'][0]['without_search']:.2f}; "
                 f"less random plans {over['random']:+.3f}, less NSGA-II {over['nsga2']:+.3f}"
                 f"{''.join(turns)}", over["random"].value, over["random"].ends)


@rule("P5", "Knowledge transfers across configurations: it beats one plain adapter for all.",
      f"{OURS} against Shared-LoRA, the same plans, steps, seeds and examples: losses at all "
      "26 plans, scores at the six main ones; the same where both have more steps.",
      unit="times the loss", needs=p5_pieces("sensors"),
      also=[*p5_pieces("movies"), *LONGER, *LONGER_SHARED])
def p5(at: Stored) -> Found:
    """Reproduced if better in loss or score, refuted if worse, corrected on a tie.

    The verdict is of the 100 steps that both tasks have.
    """
    found, more, verdicts = {}, {}, []
    for task in ready(at, p5_pieces):
        require_alike(at, p5_pieces(task))
        plans = every_plan(at, task)
        few = few_at_random(plans)
        losses, scores = found[task] = compared(at, task, "coa", "lora", [*plans])
        middle = middle_plan(at, task, "coa", "lora")
        named = compared(at, task, "coa", "lora")[0]
        more[task] = f"{middle:.2f} at the median plan, {named:.2f} at the six main ones"
        if few:
            rest = compared(at, task, "coa", "lora", [p for p in plans if p not in few])[0]
            more[task] += (f", {rest:.2f} without random plans below {FEW_BITS} bits "
                           f"({len(few)} of them)")
        more[task] += f", {at_these_plans(at, task, 'coa', 'lora'):.2f} with the plans held fixed"
        better = losses.below(1) or bool(scores and scores.above())
        worse = losses.above(1) or bool(scores and scores.below())
        # A tie: what transfers, a plain adapter transfers as well.
        verdicts.append(REPRODUCED if better and not worse else
                        REFUTED if worse and not better else CORRECTED)
    longer = [longer_shared(at, task) for task in found
              if at.has(*joint(task, "long", "lora-long"))]
    losses = found["sensors"][0]
    return Found(over_tasks(verdicts), "Against Shared-LoRA " + "; ".join(
        f"{in_words(task, *pair)} (loss {more[task]})"
        for task, pair in found.items()) + "".join(longer),
        losses.value, losses.ends)
