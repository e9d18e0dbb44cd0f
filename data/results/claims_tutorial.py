"""Rules for the tutorial's claims, T1 to T16.

Numbers in capitals are what the tutorial says; all others come from stored results.
"""

import math
import statistics
from typing import Any

import torch
from ledger import (
    COMPUTED,
    CORRECTED,
    NOT_HERE,
    NOT_YET,
    REFUTED,
    REPRODUCED,
    SEEDS,
    Found,
    Interval,
    Stored,
    listed,
    percent,
    points,
    ratio,
    rule,
    spread,
)

LLAMA = "Llama-2-7B"
TRAINABLE, SHARE = (10e6, 20e6), (0.001, 0.003)
PRINTED, PRINTED_ALL = 13_631_488, 3_553_894_400
GIGABYTES = {"full": 80, "LoRA": 16, "QLoRA": 6}
FILES_GB = {"adapter": 0.05, "merged": 14.0, "int8": 7.0}
KNOWLEDGE = (2_000, 10_000)
RATES = (10, 100)
COST = 0.01
# How near a size must be to the stated one, and a loss to the best one.
NEAR, NEAR_LOSS = 0.02, 0.1
# A saving that is a smaller share of a run's peak changes nothing that one could run.
WORTH = 0.05
# Seconds that a change of adapter may take to be one at run time.
AT_ONCE = 1.0
# {examples: piece} of as many steps; the last two take three times them.
CURVE = {n: f"curve_{n}" for n in (100, 300, 1000, 1600)}
LONGER = ("curve_5000", "curve_1600_longer")
# The settings of `curve_1600`, seed by seed: each sees 1,600 of all examples, its own draw.
ALIKE = ("lora", "lora_1", "lora_2")
# Points that one may lose and still be called a match.
MATCH = 2.0
SPLITS = {"test": "the test", "test_phrasings": "new phrasings"}
SWEEPS = ("sweeps_1", "sweeps_2")
# Full fine-tuning at a third of that rate, which changes nothing of what a step computes. These
# runs were made as LoRA's were, seed by seed, those at the best rate were not: costs are of them.
SLOWER = "full_1e-4"


def runs(at: Stored, mode: str) -> list[dict[str, Any]]:
    """The stored runs of a mode, seed by seed."""
    return [at[name] for name in of_seeds(mode)]


def of_seeds(mode: str) -> tuple[str, ...]:
    """Names of a mode's pieces: the first seed's has no number."""
    return (mode, *(f"{mode}_{seed}" for seed in SEEDS[1:]))


@rule("T1", "LoRA trains 10 to 20 million of 7 billion parameters, 0.1 to 0.3 %.",
      "Counted by peft on the meta device, and by formula.", unit="%", needs=["sizes"])
def t1(at: Stored) -> Found:
    """Reproduced if the tutorial's own target set is within both ranges, corrected if another."""
    row = at["sizes"]["models"][LLAMA]
    share = {n: c / (row["parameters"] + c) for n, c in row["adapters"].items()}
    inside = {n for n, c in row["adapters"].items()
              if TRAINABLE[0] <= c <= TRAINABLE[1] and SHARE[0] <= share[n] <= SHARE[1]}
    verdict = REPRODUCED if "standard" in inside else CORRECTED if inside else REFUTED
    return Found(verdict, f"The tutorial's adapter of {LLAMA} has {row['peft']:,} of "
                 f"{row['parameters']:,} parameters ({percent(share['standard'], 2)}); "
                 f"{percent(share['minimal'], 2)} with the minimal and "
                 f"{percent(share['aggressive'], 2)} with the aggressive target set",
                 100 * share["standard"])


@rule("T2", "At 7B full fine-tuning needs 80 GB or more of GPU memory, LoRA 16 GB, QLoRA 6 GB.",
      "Weights, gradients and Adam's moments added up, activations left out; peak memory "
      "measured on the small model.", unit="GB", needs=["sizes", "full", "lora", "qlora"])
def t2(at: Stored) -> Found:
    """The sums are lower bounds, so one above its claim (or full below) refutes.

    Computed if all hold, also in pure bf16 and with a full batch; else corrected.
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
        verdict = COMPUTED if whole else CORRECTED
    peaks = ", ".join(f"{at[n]['peak_mb'] / 1000:.1f}" for n in ("full", "lora", "qlora"))
    return Found(verdict, f"Computed, not measured: without activations {mixed:.0f} GB in mixed "
                 f"precision ({pure:.0f} in pure bf16), {lora:.1f} with LoRA, {qlora:.1f} with "
                 f"QLoRA, and a full batch adds at least {batch:.1f}; the small model's peaks, "
                 f"activations included, are {peaks} GB", qlora + batch)


@rule("T3", "LoRA adds A x B to a weight: 2 d r numbers instead of d x d.",
      "A layer merged by peft, compared with the formula with and without alpha / r.",
      unit="times fewer", needs=["sizes"])
def t3(at: Stored) -> Found:
    """Reproduced if the bare product is what peft merges, corrected if the scaled one is."""
    row = at["sizes"]["update"]
    bare, scaled = row["error_without_scale"], row["error_with_scale"]
    verdict = REPRODUCED if bare < 1e-4 else CORRECTED if scaled < 1e-4 else REFUTED
    return Found(verdict, f"The count holds ({row['before']:,} become {row['after']:,}), but the "
                 f"update is (alpha / r) B A with A {row['A']} and B {row['B']}: without the scale "
                 f"it is off by {percent(bare, 0)}, with it by less than {1e-4:g}"
                 if verdict == CORRECTED else
                 f"Against peft's merge the bare formula is off by {percent(bare)}, the scaled "
                 f"one by {percent(scaled)}", row["before"] / row["after"])


@rule("T4", "For Llama-2-7B, r = 16 on q, k, v, o, peft prints 13,631,488 trainable of "
      "3,553,894,400 parameters.", "Counted by peft on the meta device; every total with and "
      "without packing and adapters.", unit="parameters", needs=["sizes"])
def t4(at: Stored) -> Found:
    """Reproduced if both numbers are right, corrected if only the trainable one is."""
    models = at["sizes"]["models"]
    own = models[LLAMA]["peft"]
    owners = [name for name, row in models.items() if row["peft"] == PRINTED]
    totals = {base + extra for row in models.values()
              for base in (row["parameters"], row["packed"])
              for extra in (0, *row["adapters"].values())}
    right = (own == PRINTED, PRINTED_ALL in totals)
    verdict = REPRODUCED if all(right) else CORRECTED if right[0] else REFUTED
    fits = "is one" if right[1] else "is none"
    return Found(verdict, f"{LLAMA} gives {own:,}; {PRINTED:,} is the count of "
                 f"{' and '.join(owners) or 'no model here'}; {PRINTED_ALL:,} {fits} of "
                 f"{len(totals)} totals counted", own)


@rule("T5", "More target modules cost time and give quality: minimal, standard, aggressive.",
      "Three full runs, one seed, compared on the same 500 test examples; steps of each set in "
      "turn.", unit="points", needs=["targets_minimal", "targets_standard", "lora",
                                     "targets_speed"], also=["rank_4", "rank_64"])
def t5(at: Stored) -> Found:
    """Reproduced if all seven are better than q and v, and slower; corrected if one of the two."""
    rows = [at[n] for n in ("targets_minimal", "targets_standard", "lora")]
    gap = points([rows[2]["test"]], [rows[0]["test"]])
    step = spread(at["targets_speed"], "aggressive_step_ratio")
    better, slower = gap.above(), step.above(1)
    verdict = REPRODUCED if better and slower else CORRECTED if better or slower else REFUTED
    shares, mb = ("/".join(each) for each in zip(*(
        (f"{100 * r['test']['share']:.1f}", f"{r['saved_mb']:.1f}") for r in rows), strict=True))
    ranks = {n: at[n] for n in ("rank_4", "rank_64") if at.has(n)}
    more = "".join(f"; rank {r['settings']['rank']}: {percent(r['test']['share'])}"
                   for r in ranks.values())
    return Found(verdict, f"{shares} % right with {mb} MB; aggressive less minimal "
                 f"{gap:+.1f} points at {step:.2f} times a step's time{more}", gap.value, gap.ends)


@rule("T6", "500 to 1,000 examples teach a style, 2,000 to 10,000 domain knowledge, 10,000 to "
      "50,000 a new task.", "Runs on 100 to 1,600 examples of invented machines, one seed; "
      "enough is the smallest set that no larger one, of as many steps, is clearly better than, "
      "on the test and on new phrasings.",
      unit="examples", needs=[*CURVE.values(), "base"], also=[*LONGER, *ALIKE])
def t6(at: Stored) -> Found:
    """Reproduced if enough is within the claim's range; refuted if nothing is learned at all.

    All 5,000 take three times the steps of the others; as many on 1,600 are beside them.
    While those two are missing and the largest set is the best, there is no verdict.
    Only the number of examples may differ, so all must be of one dtype. What the seed alone
    changes is said beside: a size has one run.
    """
    at.require_one_dtype(*CURVE.values(), *LONGER)
    rows = {n: at[name] for n, name in CURVE.items()}

    def gaps(more: dict[str, Any], fewer: dict[str, Any]) -> dict[str, Interval]:
        return {split: points([more[split]], [fewer[split]]) for split in SPLITS}

    enough = next(n for n in rows if not any(gap.above() for m in rows if m > n
                                             for gap in gaps(rows[m], rows[n]).values()))
    curve = ", ".join(f"{n:,}: {percent(r['test']['share'])} and "
                      f"{percent(r['test_phrasings']['share'])}" for n, r in rows.items())
    if at.has(*LONGER):
        more = gaps(*(at[name] for name in LONGER))
        enough = 5000 if any(gap.above() for gap in more.values()) else enough
        curve += "; 5,000 less 1,600 in three times the steps " + " and ".join(
            f"{gap:+.1f}" for gap in more.values()) + " points"
    elif enough == max(CURVE):
        return Found(NOT_YET, f"More may help still ({curve}); to be made: {listed(LONGER)}")
    top, floor = max(r["test"]["low"] for r in rows.values()), max(
        r["test"]["high"] for r in at["base"].values())
    verdict = (REFUTED if top <= floor else
               REPRODUCED if KNOWLEDGE[0] <= enough <= KNOWLEDGE[1] else CORRECTED)
    before = max((n for n in CURVE if n < enough), default=0)
    alike = [at[name] for name in ALIKE if at.has(name)]
    shares = [[100 * row[split]["share"] for row in alike] for split in SPLITS]
    apart = [max(x) - min(x) for x in shares] if len(alike) > 1 else []
    luck = (f"; a size has one run, and {len(alike)} runs on 1,600 of all examples, each with its "
            f"own seed and draw, differ by up to {' and '.join(f'{x:.1f}' for x in apart)} points"
            ) if apart else ""
    return Found(verdict, f"Enough for this domain are {enough:,} (right on the test and on new "
                 f"phrasings: {curve}){luck}; larger sets and other kinds of task were not tried",
                 enough, (before, enough))


def log_losses(at: Stored, part: str) -> dict[str, list[float]]:
    """{setting: log of the held-out loss, seed by seed} of a sweep; infinite where it diverged."""
    found: dict[str, list[float]] = {}
    for name in ("sweeps", *(n for n in SWEEPS if at.has(n))):
        for key, row in at[name][part].items():
            loss = row["validation_loss"]
            found.setdefault(key, []).append(math.log(loss) if loss else math.inf)
    return found


@rule("T7", "LoRA needs a learning rate 10 to 100 times that of full fine-tuning.",
      "Short runs at four rates each by held-out loss; the interval is what the grid's "
      "steps leave open.", unit="times", needs=["sweeps"], also=SWEEPS)
def t7(at: Stored) -> Found:
    """Reproduced if all ratios that the grid leaves open are in the range, corrected if the best
    rates' ratio is above 1."""
    every = log_losses(at, "learning_rate")
    best, steps, curves = {}, {}, {}
    for mode in ("lora", "full"):
        curve = curves[mode] = {float(key.split()[1]): statistics.mean(logs)
                                for key, logs in every.items() if key.startswith(mode)}
        rates = sorted(curve)
        place = rates.index(min(curve, key=lambda rate: curve[rate]))
        if place in (0, len(rates) - 1):
            return Found(NOT_YET, f"The best rate of {mode} is at the end of the sweep: "
                         "sweep further")
        best[mode], steps[mode] = rates[place], (rates[place - 1], rates[place + 1])
    times = best["lora"] / best["full"]
    low, high = steps["lora"][0] / steps["full"][1], steps["lora"][1] / steps["full"][0]
    verdict = (REPRODUCED if RATES[0] <= round(low) and round(high) <= RATES[1] else
               CORRECTED if times > 1 else REFUTED)
    near = min(curves["lora"], key=lambda rate: abs(math.log(rate / best["full"])))
    cost = math.exp(curves["lora"][near] - curves["lora"][best["lora"]])
    return Found(verdict, f"Best rates {best['lora']:g} and {best['full']:g}, {times:.0f} times "
                 f"({low:.0f} to {high:.0f} by the grid; {count(every)}); at {near:g} LoRA's loss "
                 f"is {cost:.1f} times its best", times, (low, high))


def count(every: dict[str, list[float]]) -> str:
    """How many seeds a sweep has."""
    seeds = min(map(len, every.values()))
    return "one seed" if seeds == 1 else f"{seeds} seeds"


@rule("T8", "alpha = 2 r is a good choice.", "Short runs at r = 16 with a quarter of it and four "
      "times it, held-out loss over that of the best; other ranks and rsLoRA beside.",
      unit="times the best loss", needs=["sweeps"], also=[*SWEEPS, "alpha"])
def t8(at: Stored) -> Found:
    """Reproduced if it is within a tenth of the best loss, refuted if it is the worst.

    A best at the grid's edge may have a better one beyond it: that corrects the claim at most.
    """
    every = log_losses(at, "alpha")
    mean = {key: statistics.mean(logs) for key, logs in every.items()}
    best, ruled = min(mean, key=lambda key: mean[key]), "alpha 32"
    above = math.exp(mean[ruled] - mean[best])
    alphas = sorted(mean, key=lambda key: int(key.split()[1]))
    inside = best not in (alphas[0], alphas[-1])
    verdict = (REPRODUCED if above <= 1 + NEAR_LOSS and inside else
               REFUTED if mean[ruled] == max(mean.values()) else CORRECTED)
    more = "".join(
        f"; at {rank} alpha = 2 r has {rows['alpha 2r']['validation_loss'] / least:.2f} times the "
        f"least loss of {', '.join(rows)}" for rank, rows in (
            at["alpha"].items() if at.has("alpha") else ())
        for least in [min(r["validation_loss"] or math.inf for r in rows.values())])
    edge = "" if inside else " and the last of the grid"
    return Found(verdict, f"The loss with {ruled} is {above:.2f} times that with {best}, the best "
                 f"of {len(mean)}{edge} ({count(every)}){more}", above)


@rule("T9", "paged_adamw_8bit saves memory and prevents running out of it.",
      "Bytes that AdamW in 32 and in 8 bits holds after a step, as a share of a run's peak.",
      unit="% of LoRA's peak", needs=["sizes", "lora", "full"])
def t9(at: Stored) -> Found:
    """Reproduced if it saves a share of LoRA's peak that matters, corrected if less."""
    row, share = at["sizes"]["optimizers"], {}
    for mode, mb in row["mb"].items():
        share[mode] = (mb["32"] - mb["8"]) / at[mode]["peak_mb"]
    verdict = (REPRODUCED if share["lora"] >= WORTH else
               CORRECTED if min(share.values()) > 0 else REFUTED)
    said = "; ".join(f"{name} {row['mb'][mode]['32']:,.0f} to {row['mb'][mode]['8']:.0f} MB, "
                     f"{percent(share[mode])} of the peak"
                     for mode, name in (("lora", "LoRA"), ("full", "full fine-tuning")))
    paged = "; pages need CUDA and were not measured" if row["paged"] else ""
    return Found(verdict, f"8 bits save little where little is trained: {said}{paged}"
                 if verdict == CORRECTED else f"8 bits instead of 32: {said}{paged}",
                 100 * share["lora"])


@rule("T10", "At 7B the adapter has 50 MB, the merged model 14.0 GB, the INT8 model 7.0 GB.",
      "By formula; the same formula against the small model's files.", unit="GB in INT8",
      needs=["sizes", "pipeline", "lora"])
def t10(at: Stored) -> Found:
    """Reproduced if all three are within 2 %, corrected if some are."""
    gb, small = at["sizes"]["files_gb"], at["sizes"]["embedded_mb"]
    adapters = {bits: gb[f"adapter, {bits}"] for bits in ("float32", "float16")}
    made = {"adapter": min(adapters.values(), key=lambda x: abs(x - FILES_GB["adapter"])),
            "merged": gb["merged"], "int8": gb["int8"]}
    right = [n for n, said in FILES_GB.items() if abs(made[n] / said - 1) < NEAR]
    verdict = (REPRODUCED if len(right) == len(FILES_GB) else CORRECTED if right else REFUTED)
    disk = {"merged": at["pipeline"]["dequantized"]["mb"], "int8": at["pipeline"]["int8"]["mb"],
            "adapter, float32": at["lora"]["saved_mb"]}
    off = max(abs(mb / small[name] - 1) for name, mb in disk.items())
    return Found(verdict, f"Adapter {1000 * adapters['float32']:.1f} MB in float32 and "
                 f"{1000 * adapters['float16']:.1f} in float16, merged {gb['merged']:.2f} GB, INT8 "
                 f"{gb['int8']:.2f} GB; on the small model the formulas are within "
                 f"{percent(off)} of the files", gb["int8"])


@rule("T11", "llm_int8_threshold = 6.0 leaves outliers out of the quantisation.",
      "Columns above 6.0 in the merged model; held-out loss of LLM.int8 without the threshold "
      "over that with it, by groups of ten examples.", unit="times the loss",
      needs=["outliers"])
def t11(at: Stored) -> Found:
    """Reproduced if leaving the outliers in costs loss, corrected if no cost shows."""
    row = at["outliers"]
    logs = torch.tensor([row["losses"]["none"], row["losses"]["6.0"]], dtype=torch.float64).log()
    effect = ratio(logs[0] - logs[1])
    there = row["with_outliers"] > 0
    verdict = (REPRODUCED if there and effect.above(1) else
               CORRECTED if there and not effect.below(1) else REFUTED)
    return Found(verdict, f"{row['with_outliers']} of {row['inputs']} inputs have outlier columns, "
                 f"{percent(row['products_in_8_bits'])} of the products stay in 8 bits; left in, "
                 f"the layers' errors are {row['error_ratio']:.1f} times as large and the loss "
                 f"{effect:.2f} times; of the weights none escapes"
                 + ("" if row["weights_in_float"] == 0 else
                    f" but {row['weights_in_float']}"), effect.value, effect.ends)


@rule("T12", "INT8 by bitsandbytes is what one serves at the edge.",
      "Decode speed in turn on 2 cores against llama.cpp's Q8_0; scores on the same examples; "
      "bytes.", unit="times as fast", needs=["serving", "pipeline", "edge"])
def t12(at: Stored) -> Found:
    """Reproduced if no 8-bit file is faster; corrected if INT8 at least saves bytes unharmed."""
    row, steps, q8 = at["serving"], at["pipeline"], at["edge"]["Q8_0"]
    speed, whole = spread(row, "ratio"), steps["dequantized"]
    gap = points([q8["test"]], [steps["int8"]["test"]])
    loses = points([steps["int8"]["test"]], [whole["test"]]).below()
    saves = steps["int8"]["mb"] < whole["mb"] and not loses
    verdict = REPRODUCED if not speed.above(1) else CORRECTED if saves else REFUTED
    return Found(verdict, f"LLM.int8 decodes {row['bnb_int8_tokens_per_s']:.1f} tokens/s, "
                 f"llama.cpp's Q8_0 {row['q8_tokens_per_s']:.1f}: {speed:.1f} times; Q8_0 less "
                 f"INT8 {gap:+.1f} points; of the 16-bit bytes INT8 takes "
                 f"{percent(steps['int8']['mb'] / whole['mb'], 0)}, Q8_0 "
                 f"{percent(q8['mb'] / whole['mb'], 0)}",
                 speed.value, speed.ends)


@rule("T13", "The 7 GB INT8 model is served on a Jetson Nano or an RTX 3060.",
      "Weights and the cache of 2,048 tokens, added up, against the devices' memory.", unit="GB",
      needs=["sizes"])
def t13(at: Stored) -> Found:
    """Computed if it fits both, corrected if it fits one."""
    row = at["sizes"]
    needed = row["files_gb"]["int8"] + row["files_gb"]["cache"]
    fits = {name for name, gb in row["devices_gb"].items() if gb >= needed}
    verdict = (COMPUTED if len(fits) == len(row["devices_gb"]) else
               CORRECTED if fits else REFUTED)
    said = ", ".join(f"{name} ({gb} GB) {'holds' if name in fits else 'does not hold'} it"
                     for name, gb in row["devices_gb"].items())
    return Found(verdict, f"Weights and cache are {needed:.1f} GB: {said}", needed)


@rule("T14", "LoRA matches full fine-tuning at 1 % of the cost.",
      "Three seeds of each on the same data, each at the best rate of the sweep, scored on the "
      "same examples, with new phrasings; cost in peak memory, time and bytes, against full "
      "fine-tuning at a third of that rate, which was run as LoRA was.", unit="points",
      needs=[*of_seeds("full"), *of_seeds("lora"), *of_seeds(SLOWER), "sizes"],
      also=of_seeds("qlora"))
def t14(at: Stored) -> Found:
    """Reproduced if it matches and no cost is above 2 %, refuted if it is worse and dear.

    It matches if the whole interval says that full is at most 2 points better; it is
    worse if full is clearly better. Neither is an open question, and corrects the claim.
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
    verdict = (REPRODUCED if matches and cheap else
               REFUTED if worse and not cheap else CORRECTED)
    said = ", ".join(f"{gap:+.1f} points on {SPLITS[split]}" for split, gap in gaps.items())
    if at.has(*of_seeds("qlora")):
        less = points([r["test"] for r in lora], [r["test"] for r in runs(at, "qlora")])
        said += f", LoRA less QLoRA {less:+.1f}"
    less = points([r["test"] for r in beside], [r["test"] for r in lora])
    said += f", full at a third of its rate less LoRA {less:+.1f}"
    gb, files = at["sizes"]["memory_gb"], at["sizes"]["files_gb"]
    big = gb["LoRA"]["sum"] / gb["full, mixed precision"]["sum"]
    return Found(verdict, f"Full less LoRA {said}; LoRA takes {memory} of the memory, {time} of "
                 f"the time (seed by seed), {percent(costs[2].value)} of the bytes "
                 f"(at 7B by formula {percent(big, 0)} of the memory, "
                 f"{percent(files['adapter, float32'] / files['merged'])} of the bytes)",
                 gaps["test"].value, gaps["test"].ends)


@rule("T15", "The adapter is swappable at run time.",
      "Requests for two adapters mixed under load, each answer checked; the first token after "
      "a change against one without.", unit="ms", needs=["load", "serving"])
def t15(at: Stored) -> Found:
    """Reproduced if every answer is from its own adapter and a change is quick."""
    row, swap = at["load"], spread(at["serving"], "swap_ms")
    right = row["answered"] == row["with_own_adapter"] == row["requests"]
    quick = swap.high < 1000 * AT_ONCE
    verdict = REPRODUCED if right and quick else CORRECTED if right else REFUTED
    return Found(verdict, f"{row['with_own_adapter']} of {row['requests']} answers to "
                 f"{row['clients']} clients had the form of their own adapter's; after a change "
                 f"the first token comes {swap:.1f} ms later", swap.value, swap.ends)


@rule("T16", "The code of the page runs.", "Its calls with its arguments on a tiny model, on the "
      "pinned versions, nothing trained.", unit="calls that fail", needs=["page"])
def t16(at: Stored) -> Found:
    """Refuted if a call fails that would fail with a GPU, too; corrected if faults show."""
    row = at["page"]
    failed = {name for part in ("calls", "arguments") for name, r in row[part].items()
              if r["error"]}
    broken = {name for part in ("calls", "arguments") for name, r in row[part].items()
              if r["error"] and not r["wants_gpu"]}
    wrong = [name for name, shown in row["faults"].items() if shown]
    verdict = (REFUTED if broken else NOT_HERE if failed else
               CORRECTED if wrong else REPRODUCED)
    calls = [name for name in row["calls"] if name in broken]
    arguments = [name for name in row["arguments"] if name in broken]
    named = f" ({', '.join(calls)}; arguments: {', '.join(arguments) or 'none'})" if broken else ""
    return Found(verdict, f"{len(calls)} of {len(row['calls'])} calls fail{named}; of "
                 f"{len(row['faults'])} faults that raise nothing {len(wrong)} show", len(calls))

