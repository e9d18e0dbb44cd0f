"""Rules for the tutorial's claims, T1 to T16.

Numbers in capitals are what the tutorial says; all others come from stored results.
"""

import math
import statistics
from typing import Any

import numpy as np
import torch

from data.evidence.ledger import (
    COMPUTED,
    INCONCLUSIVE,
    NOT_HERE,
    PARTLY,
    REFUTED,
    REPRODUCED,
    SEEDS,
    Interval,
    Judgement,
    Stored,
    listed,
    not_yet,
    of_parts,
    percent,
    points,
    ratio,
    rule,
    seeds_needed,
    spread,
)
from lib.errors import require

LLAMA = "Llama-2-7B"
TRAINABLE, SHARE = (10e6, 20e6), (0.001, 0.003)
PRINTED, PRINTED_ALL = 13_631_488, 3_553_894_400
GIGABYTES = {"full": 80, "LoRA": 16, "QLoRA": 6}
FILES_GB = {"adapter": 0.05, "merged": 14.0, "int8": 7.0}
KNOWLEDGE = (2_000, 10_000)
RATES = (10, 100)
RULED = 32  # alpha = 2 r at the sweeps' rank of 16
COST = 0.01
# How close a size must be to the stated one, and a loss to the best one.
NEAR, NEAR_LOSS = 0.02, 0.1
# Nats that stand for a loss after training diverged.
HOPELESS = 10.0
# A saving below this share of a run's peak memory makes no difference in practice.
WORTH = 0.05
# Seconds that a change of adapter at run time may take.
AT_ONCE = 1.0
# {examples: piece}, all with the same steps; LONGER has two runs with three times as many.
CURVE = {n: f"curve_{n}" for n in (100, 300, 1000, 1600)}
LONGER = ("curve_5000", "curve_1600_longer")
# Runs with the settings of `curve_1600`; each seed draws its own 1,600 of all examples.
ALIKE = ("lora", "lora_1", "lora_2")
# Points that one may lose and still match.
MATCH = 2.0
SPLITS = {"test": "the test", "test_phrasings": "new phrasings"}
SWEEPS = ("sweeps_1", "sweeps_2")
# Full fine-tuning at a third of the best rate. The rate does not change what a step computes, and
# these runs were made under the same conditions as LoRA's, seed by seed. So they give the costs.
SLOWER = "full_1e-4"


def runs(at: Stored, mode: str) -> list[dict[str, Any]]:
    """The stored runs of a mode, seed by seed."""
    return [at[name] for name in of_seeds(mode)]


def of_seeds(mode: str) -> tuple[str, ...]:
    """Names of a mode's pieces: the first seed's has no number."""
    return (mode, *(f"{mode}_{seed}" for seed in SEEDS[1:]))


@rule("T1", "LoRA trains 10 to 20 million of 7 billion parameters, 0.1 to 0.3 %.",
      "Counted by peft on the meta device (no weights are loaded) and by formula.",
      short="LoRA trains 0.1 to 0.3 % of 7B parameters", unit="%", needs=["sizes"])
def t1(at: Stored) -> Judgement:
    """Reproduced if the tutorial's own target set is in both ranges, partly right if another is.

    Refuted if none is.
    """
    row = at["sizes"]["models"][LLAMA]
    share = {n: c / (row["parameters"] + c) for n, c in row["adapters"].items()}
    inside = {n for n, c in row["adapters"].items()
              if TRAINABLE[0] <= c <= TRAINABLE[1] and SHARE[0] <= share[n] <= SHARE[1]}
    verdict = REPRODUCED if "standard" in inside else PARTLY if inside else REFUTED
    headline = (f"{row['peft']:,} of {row['parameters'] / 1e9:.2f} billion parameters, "
                f"{percent(share['standard'], 2)}")
    finding = (f"The tutorial's adapter adds {row['peft']:,} parameters to {LLAMA}'s "
               f"{row['parameters']:,}, {percent(share['standard'], 2)} of all; the minimal target "
               f"set gives {percent(share['minimal'], 2)}, the aggressive one "
               f"{percent(share['aggressive'], 2)}")
    return Judgement(verdict, headline, finding, 100 * share["standard"])


@rule("T2", "At 7B full fine-tuning needs 80 GB or more of GPU memory, LoRA 16 GB, QLoRA 6 GB.",
      "Sum of weights, gradients and Adam's moments, without activations; peaks measured on the "
      "small model.",
      short="7B needs 80 GB, with LoRA 16, with QLoRA 6",
      unit="GB", needs=["sizes", "full", "lora", "qlora"])
def t2(at: Stored) -> Judgement:
    """Refuted if a sum is above its claim (or full fine-tuning's below): sums are lower bounds.

    Computed if all hold in pure bf16 and with a full batch, too. Otherwise partly right: the
    order is right, the numbers are off.
    """
    row = at["sizes"]
    gb, batch = {name: parts["sum"] for name, parts in row["memory_gb"].items()}, row["batch_gb"]
    mixed, pure, lora, qlora = (gb[n] for n in (
        "full, mixed precision", "full, pure bf16", "LoRA", "QLoRA"))
    if mixed < GIGABYTES["full"] or lora > GIGABYTES["LoRA"] or qlora > GIGABYTES["QLoRA"]:
        verdict = REFUTED
    else:
        whole = (pure >= GIGABYTES["full"] and lora + batch <= GIGABYTES["LoRA"]
                 and qlora + batch <= GIGABYTES["QLoRA"])
        verdict = COMPUTED if whole else PARTLY
    peaks = ", ".join(f"{at[n]['peak_mb'] / 1000:.1f}" for n in ("full", "lora", "qlora"))
    headline = (f"Computed {mixed:.0f}, {lora:.1f}, {qlora:.1f} GB; a batch adds at least "
                f"{batch:.1f}")
    finding = (f"By arithmetic, full fine-tuning takes {mixed:.0f} GB in mixed precision "
               f"({pure:.0f} in pure bf16), LoRA {lora:.1f} and QLoRA {qlora:.1f}; the activations "
               f"of a full batch add at least {batch:.1f}. Measured on the small model: {peaks} GB")
    return Judgement(verdict, headline, finding, qlora + batch)


@rule("T3", "LoRA adds A x B to a weight: 2 d r numbers instead of d x d.",
      "A layer merged by peft against the formula, with and without alpha / r.",
      short="LoRA's update is A x B, 2 d r numbers", unit="times fewer", needs=["sizes"])
def t3(at: Stored) -> Judgement:
    """Reproduced if peft merges the bare product, partly right if it merges the scaled one."""
    row = at["sizes"]["update"]
    bare, scaled = row["error_without_scale"], row["error_with_scale"]
    verdict = REPRODUCED if bare < 1e-4 else PARTLY if scaled < 1e-4 else REFUTED
    headline = (f"Off by {percent(bare, 0)} without the factor alpha / r, by {percent(scaled, 0)} "
                "with it")
    finding = (f"Compared with peft's merge, the bare formula is off by {percent(bare)}, the "
               f"scaled one by {percent(scaled)}")
    if verdict == PARTLY:
        finding = (f"The count is right ({row['before']:,} become {row['after']:,}). The update is "
                   f"(alpha / r) B A with A {row['A']} and B {row['B']}: without the factor it is "
                   f"off by {percent(bare, 0)}, with it by less than {1e-4:g}")
    return Judgement(verdict, headline, finding, row["before"] / row["after"])


@rule("T4", "For Llama-2-7B, r = 16 on q, k, v, o, peft prints 13,631,488 trainable of "
      "3,553,894,400 parameters.", "Counted by peft on the meta device; the total is looked up "
      "among those of several models, packed or not, with and without adapters.",
      short="peft prints 13,631,488 for Llama-2-7B", unit="parameters", needs=["sizes"])
def t4(at: Stored) -> Judgement:
    """Reproduced if both numbers are right, partly right if the trainable one is, else refuted."""
    models = at["sizes"]["models"]
    own = models[LLAMA]["peft"]
    owners = [name for name, row in models.items() if row["peft"] == PRINTED]
    totals = {base + extra for row in models.values()
              for base in (row["parameters"], row["packed"])
              for extra in (0, *row["adapters"].values())}
    right = (own == PRINTED, PRINTED_ALL in totals)
    verdict = REPRODUCED if all(right) else PARTLY if right[0] else REFUTED
    fits = "one" if right[1] else "none"
    whose = " and ".join(owners) or "no model here"
    finding = (f"{LLAMA} gives {own:,}. The {PRINTED:,} are those of {whose}; the total, "
               f"{PRINTED_ALL:,}, is {fits} of the {len(totals)} totals that we counted")
    return Judgement(verdict, f"{LLAMA} gives {own:,}; {PRINTED:,} is {whose}", finding, own)


@rule("T5", "More target modules cost time and give quality: minimal, standard, aggressive.",
      "Three full runs with one seed, scored on the same 500 test examples; steps timed in turn.",
      short="More target modules: better and slower",
      unit="points", needs=["targets_minimal", "targets_standard", "lora", "targets_speed"],
      also=["rank_4", "rank_64"])
def t5(at: Stored) -> Judgement:
    """Two parts, as in `of_parts`: all seven modules are better than q and v, and slower.

    A part is open while its interval holds "no difference".
    """
    rows = [at[n] for n in ("targets_minimal", "targets_standard", "lora")]
    gap = points([rows[2]["test"]], [rows[0]["test"]])
    step = spread(at["targets_speed"], "aggressive_step_ratio")
    slower = step.shows(1)
    shares, mb = (", ".join(each) for each in zip(*(
        (f"{100 * r['test']['share']:.1f}", f"{r['saved_mb']:.1f}") for r in rows), strict=True))
    ranks = {n: at[n] for n in ("rank_4", "rank_64") if at.has(n)}
    more = "".join(f"; all seven at rank {r['settings']['rank']}: {percent(r['test']['share'])}"
                   for r in ranks.values())
    headline = (f"Seven modules, not two: {gap:+.1f} points; a step takes {step.value:.2f} times "
                "as long")
    doubt = " (no clear difference)" if slower is None else ""
    finding = (f"Minimal, standard, aggressive: {shares} % right with adapters of {mb} MB. All "
               f"seven modules are {gap:+.1f} points above q and v; a step takes {step:.2f} times "
               f"as long{doubt}{more}")
    return Judgement(of_parts(gap.shows(), slower), headline, finding, gap.value, gap.ends)


@rule("T6", "500 to 1,000 examples teach a style, 2,000 to 10,000 domain knowledge, 10,000 to "
      "50,000 a new task.", "Runs on 100 to 1,600 examples of invented machines, one run a size. "
      "A set is enough if no larger one, in as many steps, is clearly better on the test or on "
      "new phrasings.",
      short="A new domain takes 2,000 to 10,000 examples",
      unit="examples", needs=[*CURVE.values(), "base"], also=[*LONGER, *ALIKE])
def t6(at: Stored) -> Judgement:
    """Reproduced if enough is within the claim's range, refuted if nothing is learned at all.

    Otherwise inconclusive: one domain with one run a size cannot decide what domains, styles
    and tasks need in general.

    All 5,000 take three times the steps of the others; as many on 1,600 are beside them.
    While those two are missing and the largest set is the best, there is no verdict.
    Only the number of examples may differ, so all must be of one dtype. The finding also says
    how much the seed alone changes, because each size has one run.
    """
    at.require_one_dtype(*CURVE.values(), *LONGER)
    rows = {n: at[name] for n, name in CURVE.items()}

    def gaps(more: dict[str, Any], fewer: dict[str, Any]) -> dict[str, Interval]:
        return {split: points([more[split]], [fewer[split]]) for split in SPLITS}

    enough = next(n for n in rows if not any(gap.above() for m in rows if m > n
                                             for gap in gaps(rows[m], rows[n]).values()))
    curve = ", ".join(f"{n:,}: {100 * r['test']['share']:.1f} and "
                      f"{percent(r['test_phrasings']['share'])}" for n, r in rows.items())
    largest = max(CURVE)
    if at.has(*LONGER):
        more = gaps(*(at[name] for name in LONGER))
        largest = 5000
        enough = largest if any(gap.above() for gap in more.values()) else enough
        curve += "; 5,000 minus 1,600 in three times the steps " + " and ".join(
            f"{gap:+.1f}" for gap in more.values()) + " points"
    elif enough == max(CURVE):
        return not_yet(f"More examples may still help ({curve}); to be made: {listed(LONGER)}")
    top, floor = max(r["test"]["low"] for r in rows.values()), max(
        r["test"]["high"] for r in at["base"].values())
    verdict = (REFUTED if top <= floor else
               REPRODUCED if KNOWLEDGE[0] <= enough <= KNOWLEDGE[1] else INCONCLUSIVE)
    before = max((n for n in CURVE if n < enough), default=0)
    alike = [at[name] for name in ALIKE if at.has(name)]
    shares = [[100 * row[split]["share"] for row in alike] for split in SPLITS]
    apart = [max(x) - min(x) for x in shares] if len(alike) > 1 else []
    luck = (f". One run a size; {len(alike)} runs of other seeds and draws of 1,600 differ by up "
            f"to {' and '.join(f'{x:.1f}' for x in apart)} points") if apart else ""
    headline = f"{enough:,} examples are enough for this domain; other tasks were not tried"
    finding = (f"{enough:,} examples are enough here (right on the test and on new phrasings, by "
               f"examples: {curve}){luck}. Not tried: more than {largest:,} examples, other tasks; "
               "a task of each of the three kinds would decide")
    return Judgement(verdict, headline, finding, enough, (before, enough))


def log_losses(at: Stored, part: str) -> dict[str, list[float]]:
    """{setting: log of the held-out loss, seed by seed} of a sweep; infinite where it diverged."""
    rows = [at[name][part] for name in ("sweeps", *SWEEPS)]
    require(all(row.keys() == rows[0].keys() for row in rows),
            "The sweeps tried different settings: make them again")
    return {key: [math.log(row[key]["validation_loss"] or math.inf) for row in rows]
            for key in rows[0]}


@rule("T7", "LoRA needs a learning rate 10 to 100 times that of full fine-tuning.",
      "Short runs at six rates each, judged by held-out loss; the best rate is the lowest point of "
      "a parabola through the best three, in logarithms. The interval is over seeds.",
      short="LoRA's learning rate is 10 to 100 times higher",
      unit="times", needs=["sweeps", *SWEEPS])
def t7(at: Stored) -> Judgement:
    """Two parts: LoRA's rate is higher, and the factor is in the claim's range."""
    every = log_losses(at, "learning_rate")
    curves = {mode: [{float(key.split()[1]): logs[seed] for key, logs in every.items()
                      if key.startswith(mode)} for seed in range(len(SEEDS))]
              for mode in ("lora", "full")}
    best = {mode: [best_rate(curve) for curve in rows] for mode, rows in curves.items()}
    if None in (*best["lora"], *best["full"]):
        return not_yet("The best rate of a seed is at an end of its sweep, or beside a rate at "
                       "which training diverged: add rates")
    times = ratio(torch.tensor(best["lora"]).log() - torch.tensor(best["full"]).log())
    inside = (True if times.above(RATES[0]) and times.below(RATES[1]) else
              False if times.below(RATES[0]) or times.above(RATES[1]) else None)
    verdict = of_parts(times.shows(1), inside)
    lora, full = (statistics.geometric_mean(best[mode]) for mode in ("lora", "full"))
    near = min(curves["lora"][0], key=lambda rate: abs(math.log(rate / full)))
    cost = ratio(torch.tensor([curve[near] - min(curve.values()) for curve in curves["lora"]]))
    headline = f"Best rates {lora:.2g} and {full:.2g}, a factor of {times:.1f}"
    finding = (f"LoRA is best at {lora:.2g}, full fine-tuning at {full:.2g}, a factor of "
               f"{times:.1f} ({len(SEEDS)} seeds). At {near:g} LoRA's loss is {cost:.1f} times "
               "its best")
    return Judgement(verdict, headline, finding, times.value, times.ends)


def best_rate(curve: dict[float, float]) -> float | None:
    """The rate of the lowest loss: the vertex of a parabola through the best three, in logs.

    None if the best is at an end of the sweep, or beside a rate at which training diverged.
    """
    rates = sorted(curve)
    place = min(range(len(rates)), key=lambda i: curve[rates[i]])
    near = rates[max(place - 1, 0): place + 2]
    losses = [curve[rate] for rate in near]
    if len(near) < 3 or not all(map(math.isfinite, losses)):
        return None
    bend, slope, _ = np.polyfit(np.log(near), losses, 2)
    return math.exp(-slope / (2 * bend))


@rule("T8", "alpha = 2 r is a good choice.", "Short runs at r = 16 with this alpha, a quarter of "
      "it and two to sixteen times it, by held-out loss; at ranks 4 and 64, with one seed, alpha = "
      "2 r, one alpha for all ranks, and rsLoRA. The interval is over seeds.",
      short="alpha = 2 r is a good choice",
      unit="times the best loss", needs=["sweeps", *SWEEPS], also=["alpha"])
def t8(at: Stored) -> Judgement:
    """Two parts: it is within a tenth of the best loss, and clearly better than both ends.

    The first part is open while the best is at an end of the grid: a better one may lie beyond.
    Refuted also if it is the worst.
    """
    every = {int(key.split()[1]): torch.tensor(logs).nan_to_num(posinf=HOPELESS)
             for key, logs in log_losses(at, "alpha").items()}
    alphas = sorted(every)
    best = min(every, key=lambda alpha: float(every[alpha].mean()))
    above = ratio(every[RULED] - every[best])
    at_edge = best in (alphas[0], alphas[-1])
    near = (None if at_edge else True if above.high <= 1 + NEAR_LOSS
            else False if above.above(1 + NEAR_LOSS) else None)
    ends = [ratio(every[RULED] - every[end]).below(1) for end in (alphas[0], alphas[-1])]
    worst = max(every, key=lambda alpha: float(every[alpha].mean()))
    verdict = REFUTED if worst == RULED else of_parts(near, all(ends))
    ranks = " and ".join(
        f"{rows['alpha 2r']['validation_loss'] / least:.2f} times the lowest loss at {rank}"
        for rank, rows in (at["alpha"].items() if at.has("alpha") else ())
        for least in [min(r["validation_loss"] or math.inf for r in rows.values())])
    more = f". With one seed, alpha = 2 r has {ranks}" if ranks else ""
    edge = ", at the edge of the grid" if at_edge else ""
    headline = f"{above:.2f} times the loss of the best, alpha {best}{edge}"
    finding = (f"alpha {RULED} has {above:.2f} times the loss of alpha {best}, the best of "
               f"{len(every)}{edge} ({len(SEEDS)} seeds), and is {'' if all(ends) else 'not '}"
               f"clearly better than alpha {alphas[0]} and alpha {alphas[-1]}{more}")
    return Judgement(verdict, headline, finding, above.value, above.ends)


@rule("T9", "paged_adamw_8bit saves memory and prevents running out of it.",
      "Bytes of AdamW's state after a step, in 32 and in 8 bits, as a share of the run's peak "
      "memory.",
      short="paged_adamw_8bit saves memory",
      unit="% of LoRA's peak", needs=["sizes", "lora", "full"])
def t9(at: Stored) -> Judgement:
    """Reproduced if it saves at least a twentieth of LoRA's peak memory.

    Partly right if it saves less than that, refuted if it saves nothing.
    """
    row, share = at["sizes"]["optimizers"], {}
    for mode, mb in row["mb"].items():
        share[mode] = (mb["32"] - mb["8"]) / at[mode]["peak_mb"]
    verdict = (REPRODUCED if share["lora"] >= WORTH else
               PARTLY if min(share.values()) > 0 else REFUTED)
    words = ", ".join(f"{name} from {row['mb'][mode]['32']:,.0f} to {row['mb'][mode]['8']:.0f} MB "
                      f"({percent(share[mode])} of the peak)"
                      for mode, name in (("lora", "LoRA's"), ("full", "full fine-tuning's")))
    paged = ". Paging needs CUDA and was not measured" if row["paged"] else ""
    headline = (f"Saves {percent(share['lora'])} of LoRA's peak memory, {percent(share['full'])} "
                "of full fine-tuning's")
    return Judgement(verdict, headline, f"8 bits shrink the state: {words}{paged}",
                     100 * share["lora"])


@rule("T10", "At 7B the adapter has 50 MB, the merged model 14.0 GB, the INT8 model 7.0 GB.",
      "By formula; the formula is checked against the small model's files.",
      short="At 7B: adapter 50 MB, merged 14 GB, INT8 7 GB", unit="GB in INT8",
      needs=["sizes", "pipeline", "lora"])
def t10(at: Stored) -> Judgement:
    """Reproduced if all three are within 2 %, partly right if some are, refuted if none is."""
    gb, small = at["sizes"]["files_gb"], at["sizes"]["embedded_mb"]
    adapters = {bits: gb[f"adapter, {bits}"] for bits in ("float32", "float16")}
    ours = {"adapter": min(adapters.values(), key=lambda x: abs(x - FILES_GB["adapter"])),
            "merged": gb["merged"], "int8": gb["int8"]}
    right = [n for n, stated in FILES_GB.items() if abs(ours[n] / stated - 1) < NEAR]
    verdict = REPRODUCED if len(right) == len(FILES_GB) else PARTLY if right else REFUTED
    disk = {"merged": at["pipeline"]["dequantized"]["mb"], "int8": at["pipeline"]["int8"]["mb"],
            "adapter, float32": at["lora"]["saved_mb"]}
    off = max(abs(mb / small[name] - 1) for name, mb in disk.items())
    headline = (f"Adapter {1000 * adapters['float32']:.1f} MB ({1000 * adapters['float16']:.1f} in "
                f"half precision), merged {gb['merged']:.2f}, INT8 {gb['int8']:.2f} GB")
    finding = (f"The adapter takes {1000 * adapters['float32']:.1f} MB in float32 and "
               f"{1000 * adapters['float16']:.1f} in float16, the merged model {gb['merged']:.2f} "
               f"GB, the INT8 model {gb['int8']:.2f}. The formulas fit the small model's files "
               f"within {percent(off)}")
    return Judgement(verdict, headline, finding, gb["int8"])


@rule("T11", "llm_int8_threshold = 6.0 leaves outliers out of the quantisation.",
      "Input columns above 6.0 in the merged model; held-out loss of LLM.int8 without the "
      "threshold over that with it, in groups of ten examples.",
      short="Threshold 6.0 keeps outliers out of INT8", unit="times the loss",
      needs=["outliers"])
def t11(at: Stored) -> Judgement:
    """Reproduced if there are outliers, and quantising them, too, clearly costs loss.

    Partly right if there are, and no clear cost shows: they are left out, to no use that we
    see. Refuted if there are none, or the loss clearly falls.
    """
    row = at["outliers"]
    logs = torch.tensor([row["losses"]["none"], row["losses"]["6.0"]], dtype=torch.float64).log()
    effect = ratio(logs[0] - logs[1])
    there = row["with_outliers"] > 0
    verdict = (REPRODUCED if there and effect.above(1) else
               PARTLY if there and not effect.below(1) else REFUTED)
    escaped = row["weights_in_float"]
    headline = (f"{row['with_outliers']} of {row['inputs']} inputs have outliers; quantising these "
                f"too: {effect:.2f} times the loss")
    finding = (f"{row['with_outliers']} of {row['inputs']} inputs have outlier columns; "
               f"{percent(row['products_in_8_bits'])} of the products stay in 8 bits. Quantising "
               f"the outliers, too, gives {row['error_ratio']:.1f} times the layers' errors and "
               f"{effect:.2f} times the loss. All weights are quantised"
               + (f" except those of {escaped} layers" if escaped else ""))
    return Judgement(verdict, headline, finding, effect.value, effect.ends)


@rule("T12", "INT8 by bitsandbytes is what one serves at the edge.",
      "Decode speed on 2 cores, in turn with llama.cpp's Q8_0; scores on the same examples; file "
      "sizes.",
      short="bitsandbytes INT8 is what the edge serves",
      unit="times as fast", needs=["serving", "pipeline", "edge"])
def t12(at: Stored) -> Judgement:
    """Reproduced if llama.cpp's 8-bit file is not clearly faster.

    Partly right if it is, and INT8 saves bytes without clearly losing points. Else refuted.
    """
    row, steps, q8 = at["serving"], at["pipeline"], at["edge"]["Q8_0"]
    speed, whole = spread(row, "ratio"), steps["dequantized"]
    gap = points([q8["test"]], [steps["int8"]["test"]])
    loses = points([steps["int8"]["test"]], [whole["test"]]).below()
    saves = steps["int8"]["mb"] < whole["mb"] and not loses
    verdict = REPRODUCED if not speed.above(1) else PARTLY if saves else REFUTED
    headline = f"llama.cpp's Q8_0 decodes {speed:.1f} times as fast, {gap:+.1f} points"
    finding = (f"llama.cpp's Q8_0 decodes {row['q8_tokens_per_s']:.1f} tokens/s, LLM.int8 "
               f"{row['bnb_int8_tokens_per_s']:.1f}: a factor of {speed:.1f}. Q8_0 minus INT8 is "
               f"{gap:+.1f} points. INT8 takes {percent(steps['int8']['mb'] / whole['mb'], 0)} of "
               f"the bytes in 16 bits, Q8_0 {percent(q8['mb'] / whole['mb'], 0)}")
    return Judgement(verdict, headline, finding, speed.value, speed.ends)


@rule("T13", "The 7 GB INT8 model is served on a Jetson Nano or an RTX 3060.",
      "Weights plus the cache of 2,048 tokens, against the devices' memory.",
      short="INT8 at 7B runs on a Jetson Nano or RTX 3060", unit="GB",
      needs=["sizes"])
def t13(at: Stored) -> Judgement:
    """Computed if it fits both, partly right if it fits one, refuted if it fits none."""
    row = at["sizes"]
    needed = row["files_gb"]["int8"] + row["files_gb"]["cache"]
    fits = {name for name, gb in row["devices_gb"].items() if gb >= needed}
    verdict = (COMPUTED if len(fits) == len(row["devices_gb"]) else
               PARTLY if fits else REFUTED)
    words = ", ".join(f"{'fits' if name in fits else 'too much for'} the {name} ({gb} GB)"
                      for name, gb in row["devices_gb"].items())
    return Judgement(verdict, f"Needs {needed:.1f} GB: {words}",
                     f"Weights and cache take {needed:.1f} GB: {words}", needed)


@rule("T14", "LoRA matches full fine-tuning at 1 % of the cost.",
      "Three seeds of each on the same data, each at the best rate of a first sweep, scored on the "
      "same examples and on new phrasings. Cost is peak memory, time and bytes, against full "
      "fine-tuning at a third of its rate, which ran under the same conditions as LoRA.",
      short="LoRA matches full tuning at 1 % of the cost", unit="points",
      needs=[*of_seeds("full"), *of_seeds("lora"), *of_seeds(SLOWER), "sizes"],
      also=of_seeds("qlora"))
def t14(at: Stored) -> Judgement:
    """Two parts, as in `of_parts`: LoRA matches, and no cost is above 2 % of full fine-tuning's.

    It matches if the whole intervals say that full is at most 2 points better, and fails to if
    full is clearly better. Between the two that part is open. If the cost is wrong as well, the
    verdict is inconclusive: partly right if LoRA matches, refuted if it does not.
    """
    full, lora, beside = runs(at, "full"), runs(at, "lora"), runs(at, SLOWER)
    gaps = {split: points([r[split] for r in full], [r[split] for r in lora])
            for split in SPLITS}
    ratios = ([one[key] / other[key] for one, other in zip(lora, beside, strict=True)]
              for key in ("peak_mb", "seconds", "saved_mb"))
    costs = [Interval(statistics.median(r), min(r), max(r)) for r in ratios]
    memory, time = (f"{percent(c.value, 0)} [{percent(c.low, 0)}, {percent(c.high, 0)}]"
                    for c in costs[:2])
    matches = all(gap.high <= MATCH for gap in gaps.values())
    worse = any(gap.above() for gap in gaps.values()) and not matches
    cheap = max(c.value for c in costs) < 2 * COST
    parts = (True if matches else False if worse else None, cheap)
    words = ", ".join(f"{gap:+.1f} points on {SPLITS[split]}" for split, gap in gaps.items())
    if at.has(*of_seeds("qlora")):
        less = points([r["test"] for r in lora], [r["test"] for r in runs(at, "qlora")])
        words += f"; LoRA minus QLoRA is {less:+.1f}"
    less = points([r["test"] for r in beside], [r["test"] for r in lora])
    words += f"; full at a third of its rate minus LoRA is {less:+.1f}"
    gb, files = at["sizes"]["memory_gb"], at["sizes"]["files_gb"]
    big = gb["LoRA"]["sum"] / gb["full, mixed precision"]["sum"]
    headline = (f"Full minus LoRA {gaps['test']:+.1f} points; {percent(costs[0].value, 0)} of the "
                f"memory, {percent(costs[1].value, 0)} of the time")
    quality = "is open" if parts[0] is None else "holds" if parts[0] else "fails"
    if parts[0] is None:
        words += (f"; to know full minus LoRA to {MATCH:g} points takes at least "
                  f"{seeds_needed(gaps['test'], MATCH)} seeds")
    finding = (f"The quality half {quality}: full minus LoRA is {words}. The cost half "
               f"{'holds' if cheap else 'fails'}: LoRA takes {memory} of the memory, {time} of the "
               f"time and {percent(costs[2].value)} of the bytes (at 7B, by formula, "
               f"{percent(big, 0)} of the memory and "
               f"{percent(files['adapter, float32'] / files['merged'])} of the bytes)")
    return Judgement(of_parts(*parts), headline, finding, gaps["test"].value, gaps["test"].ends)


@rule("T15", "The adapter is swappable at run time.",
      "Mixed requests for two adapters under load, each answer checked; the first token after a "
      "change of adapter against one without.",
      short="Adapters can be swapped at run time", unit="ms", needs=["load", "serving"])
def t15(at: Stored) -> Judgement:
    """Reproduced if every answer is from its own adapter and a change takes under a second.

    Partly right if it takes longer, refuted if an answer is from the wrong adapter.
    """
    row, swap = at["load"], spread(at["serving"], "swap_ms")
    right = row["answered"] == row["with_own_adapter"] == row["requests"]
    quick = swap.high < 1000 * AT_ONCE
    verdict = REPRODUCED if right and quick else PARTLY if right else REFUTED
    headline = (f"{row['with_own_adapter']} of {row['requests']} answers fit their adapter; a "
                f"change costs {swap:.1f} ms")
    finding = (f"{row['with_own_adapter']} of {row['requests']} answers to {row['clients']} "
               "clients have the form that their adapter teaches; after a change of adapter the "
               f"first token comes {swap:.1f} ms later")
    return Judgement(verdict, headline, finding, swap.value, swap.ends)


@rule("T16", "The code of the tutorial runs.",
      "Its calls with their arguments, on a tiny model, with the pinned versions; nothing is "
      "trained.",
      short="The tutorial's code runs", unit="calls that fail", needs=["page"])
def t16(at: Stored) -> Judgement:
    """Refuted if a call fails that would fail with a GPU, too.

    Partly right if none does and faults show that raise no error.
    """
    row = at["page"]
    failed = {name for part in ("calls", "arguments") for name, r in row[part].items()
              if r["error"]}
    broken = {name for part in ("calls", "arguments") for name, r in row[part].items()
              if r["error"] and not r["wants_gpu"]}
    wrong = [name for name, shown in row["faults"].items() if shown]
    verdict = (REFUTED if broken else NOT_HERE if failed else
               PARTLY if wrong else REPRODUCED)
    calls = [name for name in row["calls"] if name in broken]
    arguments = [name for name in row["arguments"] if name in broken]
    named = f" ({', '.join(calls)}; arguments: {', '.join(arguments) or 'none'})" if broken else ""
    headline = (f"{len(calls)} of {len(row['calls'])} calls fail; {len(wrong)} of "
                f"{len(row['faults'])} suspected silent faults are real")
    finding = (f"{len(calls)} of {len(row['calls'])} calls fail{named}; of "
               f"{len(row['faults'])} suspected faults without an error, {len(wrong)} are real")
    return Judgement(verdict, headline, finding, len(calls))

