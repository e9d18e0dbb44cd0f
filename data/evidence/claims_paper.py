"""Rules for the paper's claims, P1 to P5, from the stored training runs, searches and timings.

A verdict needs all seeds. It covers the tasks whose runs are complete: sensors at least, and
movies once theirs are. `over_tasks` says what the verdict is where the tasks differ.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from data.evidence.compare import MAIN, Compared, compare_losses, compare_scores, log_ratios, pairs
from data.evidence.ledger import (
    FEW_BITS,
    INCONCLUSIVE,
    PARTLY,
    REFUTED,
    REPRODUCED,
    SEEDS,
    Interval,
    Judgement,
    Stored,
    few_at_random,
    hits,
    not_yet,
    of_parts,
    percent,
    ratio,
    rule,
    seeds_needed,
    spread,
)
from lib.errors import require
from lib.evaluate.scores import paired_interval

# What a stored run measured, by the name of the configuration.
Rows = dict[str, Any]
TASKS = ("sensors", "movies")
# A model is useful where it is clearly more often right than wrong: a constant answer
# is right for half of the films, and almost never for a machine.
USEFUL = 0.5
# Nats a token; a guess among all tokens has about eleven, a trained adapter far less than one.
HOPELESS = 1.0
# Losses that differ by less match.
MATCH_LOSS, MATCH_POINTS = 1.1, 2.0
# A share of a training run that is as good as nothing.
NOTHING = 0.01
# A pass that costs at most this much more is as good as free.
FREE = 0.02
OURS = "CoA-LoRA with a change of ours (components owned by 2-bit layers)"
METHODS, SEARCHES = ("ours", "random", "nsga2"), (0, 1, 2, 3, 4)


def joint(task: str, *methods: str) -> list[str]:
    """Pieces of adapters that were trained for all configurations at once."""
    return [f"coa/{task}-{method}-{seed}" for method in methods for seed in SEEDS]


# The same in more steps: P1 and P2 say what they give, P5 what they give to both.
LONGER = [name for task in TASKS for name in joint(task, "long")]
LONGER_SHARED = [name for task in TASKS for name in joint(task, "lora-long")]


def dedicated(task: str, *seeds: int) -> list[str]:
    """Pieces of adapters that were trained for one configuration each."""
    return [f"coa/{task}-dedicated-{name.replace(' ', '-')}-{seed}"
            for seed in seeds for name in MAIN]


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
    """UserError unless the joint runs were trained over the same configurations."""
    digests = {at[name].get("training_plans") for name in names}
    require(len(digests) == 1,
            "joint runs were trained over different configurations: run them again")


def over_tasks(verdicts: Sequence[str]) -> str:
    """That of all tasks if they agree; partly right if the claim holds, or partly, on one of them.

    Otherwise some are inconclusive and some refuted: inconclusive.
    """
    if len({*verdicts}) == 1:
        return verdicts[0]
    return PARTLY if {REPRODUCED, PARTLY} & {*verdicts} else INCONCLUSIVE


def interval(found: Compared) -> Interval:
    """A stored comparison in the ledger's form."""
    return Interval(found.value, found.low, found.high)


def compared(at: Stored, task: str, one: str, other: str, configurations: Sequence[str] = MAIN
             ) -> tuple[Interval, Interval | None]:
    """Loss ratio (below 1: the first is better) and difference of scores in points."""
    losses = compare_losses(task, one, other, configurations, at.folder / "coa")
    scores = compare_scores(task, one, other, MAIN, at.folder / "coa")
    require(losses, f"{task}: {one} and {other} have no seed in common at all these configurations")
    return interval(losses), scores and interval(scores)


def measured(at: Stored, task: str) -> Rows:
    """The main configurations and those between, as measured with the first seed."""
    return at[joint(task, "coa")[0]]["plans"]


def in_words(task: str, losses: Interval, scores: Interval | None) -> str:
    """A comparison as a finding says it."""
    points = f", {scores:+.1f} points" if scores else ", scores at floor or ceiling"
    return f"{task}: {losses:.2f} times the loss{points}"


def brief(by_task: dict[str, tuple[Interval, Interval | None]]) -> str:
    """The ratios of losses alone, for a headline."""
    return ", ".join(f"{task} {losses:.2f}" for task, (losses, _) in by_task.items())


def longer_too(at: Stored, task: str, rival: str, configurations: Sequence[str] = MAIN) -> str:
    """What more joint steps give against a rival, in words."""
    steps, others = (len(at[f"coa/{task}-{method}-0"]["losses"]) for method in ("long", "coa"))
    words = in_words(task, *compared(at, task, "long", rival, configurations))
    seeds = sum(at.has(name) for name in joint(task, "long"))
    few = "" if seeds == len(SEEDS) else f" ({seeds} of {len(SEEDS)} seeds)"
    return f"in {steps / others:.1f} times the steps{few}, {words}"


def longer_shared(at: Stored, task: str) -> str:
    """What more steps give to both joint ways, in words."""
    both = "long", "lora-long"
    require_alike(at, joint(task, *both))
    return (f"; both {longer_too(at, task, both[1], [*measured(at, task)])} "
            f"({median_ratio(at, task, *both):.2f} at the median configuration, "
            f"{held_fixed(at, task, *both):.2f} with the configurations held fixed)")


def median_ratio(at: Stored, task: str, one: str, other: str) -> float:
    """Median over the configurations of the ratio of losses; a few broken ones do not move it."""
    return statistics.median(compare_losses(task, one, other, [name], at.folder / "coa").value
                             for name in measured(at, task))


def held_fixed(at: Stored, task: str, one: str, other: str) -> Interval:
    """The ratio of losses at exactly these configurations; other intervals cover new ones, too."""
    found = pairs(task, one, other, [*measured(at, task)], at.folder / "coa")
    return ratio(log_ratios(found).mean(1))


def over_base(rows: Sequence[Rows], base: Rows) -> tuple[dict[str, Interval], Interval]:
    """Share of right answers at each main configuration, and at all the loss over the bare base's.

    A seed that was not scored somewhere, because its loss was hopeless, has none right there.
    """
    shares = {}
    for name in MAIN:
        scores = [row[name].get("score") for row in rows]
        nothing = {"hits": "0" * max(len(s["hits"]) if s else 1 for s in scores)}
        shares[name] = Interval(*(min(1.0, max(0.0, x)) for x in paired_interval(
            torch.stack([hits(s or nothing) for s in scores]))))
    return shares, ratio(log_ratios([[(row[p], base[p]) for p in base] for row in rows]))


@rule("P1", "One adapter serves any configuration of bits without retraining.",
      f"{OURS} at configurations that it was not trained on, three seeds: right answers at the "
      "six main ones (useful means clearly more than half), loss over the bare base's at all 26, "
      "and the largest loss.",
      short="One adapter serves any configuration",
      unit="% of the main configurations", needs=p1_pieces("sensors"),
      also=[*p1_pieces("movies"), *LONGER])
def p1(at: Stored) -> Judgement:
    """Reproduced if useful at every main configuration, hopeless at none, better than the base.

    Partly right if better than the base and useful at some, else refuted. The verdict is on the
    100 steps that both tasks have.
    """
    tasks = ready(at, p1_pieces)
    verdicts, words, good, worst = zip(*(useful(at, task, "coa") for task in tasks), strict=True)
    longer = [useful(at, task, "long")[1] for task in tasks if at.has(*joint(task, "long"))]
    each = ", ".join(f"{count} of {len(MAIN)} ({task})"
                     for task, count in zip(tasks, good, strict=True))
    steps = len(at[joint(tasks[0], "coa")[0]]["losses"])
    return Judgement(over_tasks(verdicts),
                     f"In {steps} steps useful at {each}; worst loss {max(worst):.1f} nats",
                     "; ".join(words), 100 * sum(good) / (len(MAIN) * len(tasks)),
                     details="; ".join(longer))


def useful(at: Stored, task: str, method: str) -> tuple[str, str, int, float]:
    """P1's verdict on one way of training, in words, where it is useful, and its largest loss."""
    runs = [at[name] for name in joint(task, method)]
    rows, base = [run["plans"] for run in runs], at[f"coa/{task}-base"]["plans"]
    require_alike(at, joint(task, method))
    require(all(row[name]["plan"] == base[name]["plan"] for row in rows for name in base),
            f"{task}: {method} and base were measured at different configurations: run them again")
    shares, times = over_base(rows, base)
    worst, where = max((row[name]["loss"], name) for row in rows for name in row)
    good = [name for name, share in shares.items() if share.above(USEFUL)]
    every = len(good) == len(shares)
    verdict = (REPRODUCED if every and times.below(1) and worst < HOPELESS else
               PARTLY if good and times.below(1) else REFUTED)
    least = min(shares, key=lambda name: shares[name].value)
    low, value, high = (100 * x for x in (shares[least].low, shares[least].value,
                                          shares[least].high))
    words = (f"{task}, after {len(runs[0]['losses'])} steps: useful at {len(good)} of "
             f"{len(shares)} main configurations (the lowest, {least} bits: {value:.0f} "
             f"[{low:.0f}, {high:.0f}] %), {times:.2g} times the bare base's loss, at worst "
             f"{worst:.1f} nats ({where.removeprefix('more ')} bits)")
    return verdict, words, len(good), worst


@rule("P2", "It matches or beats adapters tuned for each configuration.",
      f"{OURS} against a dedicated adapter for each of six configurations: same steps, seeds and "
      "examples. Points leave out configurations where both answer everything right or everything "
      "wrong. A joint step has four parts (two for movies), each at another configuration, and "
      "takes the logarithm of their losses. The sweeps of the rates are not stored. The longer "
      "movie runs have half the rate: at the full rate one of three diverged.",
      short="It matches or beats dedicated adapters", unit="times the loss",
      needs=p2_pieces("sensors"),
      also=[*p2_pieces("movies"), *LONGER])
def p2(at: Stored) -> Judgement:
    """Two parts a task, as in `of_parts`: it matches in loss, and it matches in score.

    It matches where the whole interval says that it is at most a tenth worse in loss, or at
    most 2 points worse in score; it fails to where it is clearly worse; otherwise that part is
    open. So worse in loss with an open score is inconclusive.
    """
    by_task, verdicts, unknown = {}, [], []
    for task in ready(at, p2_pieces):
        require_alike(at, joint(task, "coa"))
        losses, scores = by_task[task] = compared(at, task, "coa", "dedicated")
        parts = [True if losses.high <= MATCH_LOSS else False if losses.above(1) else None]
        if parts[0] is None:
            logs = Interval(*map(math.log, (losses.value, losses.low, losses.high)))
            needed = seeds_needed(logs, math.log(MATCH_LOSS))
            unknown.append(f"{needed} seeds for the loss on {task}")
        if scores:
            parts.append(True if scores.low >= -MATCH_POINTS else
                         False if scores.below() else None)
            if parts[1] is None:
                unknown.append(f"{seeds_needed(scores, MATCH_POINTS)} seeds for the score on "
                               f"{task}")
        verdicts.append(of_parts(*parts))
    longer = [f"; {longer_too(at, task, 'dedicated')}" for task in by_task
              if at.has(f"coa/{task}-long-0")]
    losses = by_task["sensors"][0]
    finding = "Against dedicated adapters, in equal steps, " + "; ".join(
        in_words(task, *pair) for task, pair in by_task.items()) + "".join(longer)
    if unknown:
        finding += (f". To decide what is open, within a tenth of the loss or {MATCH_POINTS:g} "
                    f"points, takes at least {', '.join(unknown)}")
    return Judgement(over_tasks(verdicts), f"Times a dedicated adapter's loss: {brief(by_task)}",
                     finding, losses.value, losses.ends)


@rule("P3", "A new configuration takes no additional time.",
      "Seconds to build a new configuration and its adapter, against training an adapter; one "
      "token's pass and one joint training step, timed in turn with plain ones.",
      short="A new configuration takes no extra time", unit="s", needs=["switching", "lora"])
def p3(at: Stored) -> Judgement:
    """Two parts, as in `of_parts`: a pass takes no longer, and a new configuration takes under 1 %
    of a training run. The first is open while the interval holds 0 and more than 2 %.
    """
    row, train = at["switching"], at["lora"]["seconds"]
    build, fold = spread(row, "new_configuration_s"), spread(row, "materialise_s")
    late = spread(row, "latency_overhead")
    free = False if late.above() else True if late.high <= FREE else None
    quick = (build.value + fold.value) / train < NOTHING
    once = spread(row, "step_ratio")
    headline = (f"{build.value:.1f} s for its weights, {fold.value:.2f} s for its adapter, "
                f"against {train:.0f} s of training")
    finding = (f"A new configuration's weights take {build:.1f} s and its adapter {fold:.2f} s; "
               f"training an adapter takes {train:.0f} s. A pass takes {percent(late.value)} "
               f"[{percent(late.low)}, {percent(late.high)}] longer, a joint training step among "
               f"cached configurations {once:.2f} times as long as a plain one")
    return Judgement(of_parts(free, quick), headline, finding, build.value + fold.value,
                     (build.low + fold.low, build.high + fold.high))


@rule("P4", "The set of configurations matters, and the Pareto search improves it.",
      "Hypervolume after equal numbers of evaluations from the same start, five seeds, compared as "
      "two samples. The intervals cover the luck of the search alone: one adapter, one start, one "
      "task. Our search also evaluates greedy configurations, and two of every five evaluations go "
      "to ranges of bits that are still empty. Also: held-out loss where search and training "
      "alternate.",
      short="The Pareto search improves the set", unit="hypervolume (bits x log loss)",
      needs=[f"search/{method}-{seed}" for method in METHODS for seed in SEARCHES],
      also=[f"coa/{task}-alternated-0" for task in TASKS])
def p4(at: Stored) -> Judgement:
    """Reproduced if it beats random choice and NSGA-II; refuted if beaten, or if it gains nothing.

    Partly right if it beats one of them, inconclusive if neither difference is clear. All must
    begin at the same start, so that the volumes are comparable.
    """
    rows = {m: [at[f"search/{m}-{seed}"] for seed in SEARCHES] for m in METHODS}
    starts = {(r["without_search"], r["start"], len(r["hypervolumes"]), *r["reference"])
              for some in rows.values() for r in some}
    if len(starts) > 1:
        return not_yet("The searches had different starts or lengths: run them again")
    volume = {m: torch.tensor([r["hypervolume"] for r in some], dtype=torch.float64)
              for m, some in rows.items()}
    # A seed draws other things in another method, so nothing is paired: each with each has the
    # variance of both means, and Welch's degrees of freedom.
    over = {m: Interval(*paired_interval(volume["ours"][:, None] - volume[m]))
            for m in METHODS[1:]}
    gain = Interval(*paired_interval(volume["ours"] - rows["ours"][0]["without_search"]))
    beaten = any(x.below() for x in over.values()) or not gain.above()
    verdict = REFUTED if beaten else of_parts(*(x.shows() for x in over.values()))
    turns = ["; search and training alternating, one seed, "
             + in_words(task, *compared(at, task, "alternated", "coa", [*measured(at, task)]))
             for task in TASKS if at.has(f"coa/{task}-alternated-0", f"coa/{task}-coa-0")]
    headline = (f"Hypervolume {over['random']:+.2f} against random choice, "
                f"{over['nsga2'].value:+.2f} against NSGA-II")
    finding = (f"The search adds {gain:.3f} to a hypervolume of "
               f"{rows['ours'][0]['without_search']:.2f}: {over['random']:+.3f} against random "
               f"configurations, {over['nsga2']:+.3f} against NSGA-II{''.join(turns)}")
    return Judgement(verdict, headline, finding, over["random"].value, over["random"].ends)


@rule("P5", "Knowledge transfers across configurations: it beats one plain adapter for all.",
      f"{OURS} against Shared-LoRA, with the same configurations, steps, seeds and examples: "
      "losses at all 26 configurations, scores at the six main ones; again where both have more "
      "steps.",
      short="Knowledge transfers across configurations",
      unit="times the loss", needs=p5_pieces("sensors"),
      also=[*p5_pieces("movies"), *LONGER, *LONGER_SHARED])
def p5(at: Stored) -> Judgement:
    """Reproduced if clearly better in loss or score and clearly worse in neither.

    Refuted if the reverse is true, partly right if better in one and worse in the other, and
    inconclusive if no difference is clear. The verdict is on the 100 steps that both tasks have.
    """
    by_task, more, middle, verdicts = {}, {}, {}, []
    for task in ready(at, p5_pieces):
        require_alike(at, p5_pieces(task))
        configurations = measured(at, task)
        few = few_at_random(configurations)
        losses, scores = by_task[task] = compared(at, task, "coa", "lora", [*configurations])
        middle[task] = f"{median_ratio(at, task, 'coa', 'lora'):.2f}"
        named = compared(at, task, "coa", "lora")[0]
        more[task] = f"{task}: {named:.2f} at the six main configurations"
        if few:
            rest = compared(at, task, "coa", "lora", [p for p in configurations if p not in few])[0]
            more[task] += (f", {rest:.2f} without random ones below {FEW_BITS} bits "
                           f"({len(few)} of them)")
        more[task] += (f", {held_fixed(at, task, 'coa', 'lora'):.2f} with the configurations "
                       "held fixed")
        better = losses.below(1) or bool(scores and scores.above())
        worse = losses.above(1) or bool(scores and scores.below())
        verdicts.append(PARTLY if better and worse else REPRODUCED if better else
                        REFUTED if worse else INCONCLUSIVE)
    longer = [longer_shared(at, task) for task in by_task
              if at.has(*joint(task, "long", "lora-long"))]
    losses = by_task["sensors"][0]
    finding = "Against Shared-LoRA, " + "; ".join(
        f"{in_words(task, *pair)} ({middle[task]} at the median configuration)"
        for task, pair in by_task.items())
    details = "Times the loss, " + "; ".join(more.values()) + "".join(longer)
    return Judgement(over_tasks(verdicts), f"Times Shared-LoRA's loss: {brief(by_task)}",
                     finding, losses.value, losses.ends, details)
