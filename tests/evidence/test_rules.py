"""The rules of the ledger, on made-up results: each can give every verdict that it knows."""

import ast
import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from data.evidence import claims_field as field
from data.evidence import claims_paper as paper
from data.evidence import claims_tutorial as tutorial
from data.evidence import ledger
from data.evidence.claims_paper import METHODS, SEARCHES
from data.evidence.compare import MAIN
from data.evidence.ledger import NOT_YET, RULES, SEEDS, Stored

YES, PARTLY, OPEN, NO = (ledger.REPRODUCED, ledger.PARTLY, ledger.INCONCLUSIVE,
                         ledger.REFUTED)
Files = dict[str, dict[str, Any]]


def judge(name: str, folder: Path, files: Files) -> dict[str, Any]:
    """The entry of a claim with these results, which stay for the next call; "__" is a folder."""
    for file, result in files.items():
        path = folder / f"{file.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True)
        dtype = result.get("dtype", "float32")
        path.write_text(json.dumps({"command": f"python -m data.evidence {path.stem}",
                                    "machine": {"dtype": dtype}, "result": result}))
    entry = ledger.entry(RULES[name], Stored(folder))
    assert 0 < len(entry["headline"]) <= 90
    assert "not run" not in entry["headline"] + entry["finding"]
    return entry


def score(right: int, of: int = 100) -> dict[str, Any]:
    """The first `right` examples are right."""
    return {"hits": "1" * right + "0" * (of - right), "share": right / of,
            "low": max(0, right / of - 0.05), "high": min(1, right / of + 0.05)}


def run(right: int, other: int | None = None, **cost: Any) -> dict[str, Any]:
    """A training run, and its score on new phrasings if that is another one."""
    return {"test": score(right), "test_phrasings": score(right if other is None else other),
            "peak_mb": 1000, "seconds": 100, "saved_mb": 10, "mb": 10,
            "settings": {"rank": 16}} | cost


LLAMA = {"parameters": 6_000_000_000, "packed": 3_540_262_912, "peft": 13_631_488,
         "adapters": {"minimal": 5_000_000, "standard": 13_631_488, "aggressive": 30_000_000}}
MEMORY = {"full, mixed precision": 110, "full, pure bf16": 90, "LoRA": 13, "QLoRA": 3}
GIGABYTES = {"adapter, float32": 0.1, "adapter, float16": 0.05, "merged": 14.0, "int8": 7.0,
             "cache": 1.0}


def sizes(**changes: Any) -> Files:
    """What the piece `sizes` would hold if the tutorial were right about everything."""
    return {"sizes": {
        "models": {"Llama-2-7B": LLAMA}, "batch_gb": 2.0, "files_gb": GIGABYTES,
        "memory_gb": {name: {"sum": gb} for name, gb in MEMORY.items()},
        "embedded_mb": {"adapter, float32": 10, "merged": 10, "int8": 10},
        "devices_gb": {"one": 12, "other": 24},
        "update": {"A": [16, 8], "B": [8, 16], "before": 64, "after": 32,
                   "error_without_scale": 0.0, "error_with_scale": 0.0},
        "optimizers": {"paged": "", "mb": {"lora": {"32": 100, "8": 25},
                                           "full": {"32": 400, "8": 100}}}} | changes}


def model(*adapters: int, **changes: int) -> Files:
    names = ("minimal", "standard", "aggressive")
    row = LLAMA | changes | {"adapters": dict(zip(names, adapters, strict=True))}
    return sizes(models={"Llama-2-7B": row})


def memory(**changed: float) -> Files:
    gb = MEMORY | {{"full": "full, mixed precision", "pure": "full, pure bf16"}.get(n, n): x
                   for n, x in changed.items()}
    return sizes(memory_gb={name: {"sum": x} for name, x in gb.items()}) | dict.fromkeys(
        ("full", "lora", "qlora"), run(1))


def update(bare: float, scaled: float) -> Files:
    return sizes(update=sizes()["sizes"]["update"] | {
        "error_without_scale": bare, "error_with_scale": scaled})


def targets(minimal: int, slower: float) -> Files:
    speed = {"aggressive_step_ratio": slower,
             "aggressive_step_ratio_spread": [slower - 0.1, slower]}
    return {"targets_minimal": run(minimal), "targets_standard": run(80), "lora": run(90),
            "targets_speed": speed}


def rates(*best: float | None) -> Files:
    """Sweeps of three seeds: full fine-tuning's best rate is 1, LoRA's are these."""
    def losses(mode: str, lowest: float | None) -> Files:
        grid = [10.0 ** power for power in range(-2, 5)]
        return {f"{mode} {rate:g}": {"validation_loss": lowest and math.exp(
            math.log(rate / lowest) ** 2)} for rate in grid}

    return {name: {"learning_rate": losses("lora", rate) | losses("full", 1)}
            for name, rate in zip(("sweeps", "sweeps_1", "sweeps_2"), best, strict=True)}


def alphas(*losses: float | None, apart: float = 1.01) -> Files:
    """Sweeps of three seeds with these losses, alpha 32's `apart` from seed to seed."""
    grid = (8, 32, 64, 512)
    return {name: {"alpha": {f"alpha {a}": {"validation_loss": x and x * factor ** (a == 32)}
                             for a, x in zip(grid, losses, strict=True)}}
            for name, factor in zip(("sweeps", "sweeps_1", "sweeps_2"), (1 / apart, 1, apart),
                                    strict=True)}


def optimizers(mb: float) -> Files:
    state = {"lora": {"32": 100, "8": mb}, "full": {"32": 4, "8": 1}}
    return sizes(optimizers={"paged": "", "mb": state}) | {"lora": run(1), "full": run(1)}


def disk(**changed: float) -> Files:
    pipeline = {"dequantized": run(1), "int8": run(1)}
    gb = GIGABYTES | {{"half": "adapter, float16"}.get(n, n): x for n, x in changed.items()}
    return sizes(files_gb=gb) | {"pipeline": pipeline, "lora": run(1)}


def outliers(without: list[float], inputs: int) -> Files:
    return {"outliers": {"inputs": 10, "with_outliers": inputs, "products_in_8_bits": 0.98,
                         "error_ratio": 1.5, "weights_in_float": 0,
                         "losses": {"none": without, "6.0": [0.1, 0.1, 0.1]}}}


def serving(times: float, right: int, mb: float) -> Files:
    row = {"ratio": times, "ratio_spread": [times - 0.5, times + 0.5],
           "bnb_int8_tokens_per_s": 10, "q8_tokens_per_s": 10 * times}
    return {"serving": row, "edge": {"Q8_0": run(90)},
            "pipeline": {"dequantized": run(90), "int8": run(right, mb=mb)}}


def modes(lora: int, phrasings: int, cost: float) -> Files:
    cheap = {"peak_mb": 1000 * cost, "seconds": 100 * cost, "saved_mb": 10 * cost}
    files = sizes() | {n: run(lora, phrasings, **cheap) for n in tutorial.of_seeds("lora")}
    return files | {name: run(90) for mode in ("full", tutorial.SLOWER)
                    for name in tutorial.of_seeds(mode)}


def load(own: int, high: float) -> Files:
    return {"load": {"requests": 500, "answered": 500, "with_own_adapter": own, "clients": 16},
            "serving": {"swap_ms": 9.0, "swap_ms_spread": [-3, high]}}


def page(error: str, gpu: bool, fault: bool) -> Files:
    row = {"error": error, "wants_gpu": gpu}
    return {"page": {"calls": {"one": row}, "arguments": {"a": row}, "faults": {"f": fault}}}


def rows(loss: float, right: int = 32, digest: str = "p", only: tuple[str, ...] = MAIN,
         steps: int = 100) -> dict[str, Any]:
    """A stored run of CoA-LoRA; losses differ a little, so that intervals have a width."""
    return {"seconds": 100, "losses": [1.0] * steps, "plans": {name: {
        "plan": digest, "bits": float(name.split()[-1]), "loss": loss,
        "losses": [loss * x for x in (0.9, 1.0, 1.1)], "score": score(right, 64)}
        for name in only}}


def joint(method: str, *row: Any, task: str = "sensors", **options: Any) -> Files:
    if method == "dedicated":
        return {f"coa__{task}-dedicated-{name.replace(' ', '-')}-{seed}":
                rows(*row, only=(name,)) for name in MAIN for seed in SEEDS}
    return {f"coa__{task}-{method}-{seed}": rows(*row, **options) for seed in SEEDS}


def bare(loss: float) -> Files:
    return {"coa__sensors-base": rows(loss)}


def switching(late: list[float], train: float) -> Files:
    row = {"new_configuration_s": 1.0, "new_configuration_s_spread": [0.9, 1.1],
           "materialise_s": 0.1, "materialise_s_spread": [0.1, 0.1], "latency_overhead": 0.15,
           "latency_overhead_spread": late, "step_ratio": 1.05, "step_ratio_spread": [1.0, 1.1]}
    return {"switching": row, "lora": run(1, seconds=train)}


def searched(*gains: float) -> Files:
    return {f"search__{method}-{seed}": {
        "without_search": 30.0, "start": 36, "hypervolumes": [0] * 61, "reference": [8.6, 9.9],
        "hypervolume": 30.0 + gain * (1 + 0.01 * seed)}
        for method, gain in zip(METHODS, gains, strict=True) for seed in SEARCHES}


def forgotten(kl: float, right: int, apart: float = 1.1) -> Files:
    """Full fine-tuning with 90 right and a KL of 1; LoRA with these, seeds `apart`."""
    def ends(middle: float, score_of: int, seed: int) -> dict[str, Any]:
        windows = [middle * apart ** seed * x for x in (0.9, 1.0, 1.1)]
        row = {"test": score(score_of), "wikitext": {
            "kl": {"value": middle}, "windows": {"kl": windows}}}
        return {"steps": {step: row for step in ("25", "50", "100")}}

    files: Files = {}
    for arm, seeds, *values in (("full", (0, 0, 0), 1.0, 90), ("lora-16", SEEDS, kl, right)):
        files |= {name.replace("/", "__"): ends(*values, seed)
                  for name, seed in zip(field.of_seeds(arm), seeds, strict=True)}
    return files


def batched(lora: float, right: int, apart: float = 1.02) -> Files:
    """A large batch costs LoRA this many times the loss, seeds `apart`, full fine-tuning twice.
    Rank 4 has so many right, and the other ranks 90."""
    def grid(loss: float) -> dict[str, Any]:
        return {rate: {"validation_loss": value} for rate, value in (
            ("0.002", 1.5 * loss), ("0.004", loss), ("0.008", None))}

    files: Files = {name: {"test": score(n)} for name, n in (
        ("rank_4", right), ("lora", 90), ("rank_64", 90))}
    return files | {f"batches_{seed}": {
        "lora 8": grid(0.1), "lora 40": grid(0.1 * lora * apart ** seed),
        "full 8": grid(0.1), "full 40": grid(0.2)} for seed in SEEDS}


def at_an_end() -> Files:
    """The best rate is the lowest that was tried."""
    files = batched(4, 60)
    files["batches_1"]["full 8"]["0.002"]["validation_loss"] = 0.05
    return files


CASES = {
    "T1": [(model(5_000_000, 16_000_000, 40_000_000), YES), (model(8_000_000, 3e7, 4e7), NO),
           (model(12_000_000, 30_000_000, 40_000_000), PARTLY)],
    "T2": [(memory(), ledger.COMPUTED, 5), (memory(pure=50), PARTLY), (memory(QLoRA=5), PARTLY),
           (memory(LoRA=17), NO), (memory(full=70), NO)],
    "T3": [(update(0, 0.5), YES, 2), (update(0.5, 0), PARTLY, 2), (update(0.5, 0.5), NO, 2)],
    "T4": [(model(1, 13_631_488, 3), YES), (model(1, 13_631_488, 3, packed=1), PARTLY),
           (model(1, 16_777_216, 3, peft=16_777_216), NO, 16_777_216)],
    "T5": [(targets(50, 1.2), YES, 40), (targets(50, 1.0), PARTLY, 40),
           (targets(89, 1.2), PARTLY, 1), (targets(89, 1.0), OPEN, 1),
           (targets(99, 1.2), PARTLY, -9), (targets(99, 0.9), NO, -9)],
    "T7": [(rates(25, 30, 36), YES, 30), (rates(8, 10, 12.5), PARTLY, 10),
           (rates(300, 400, 500), PARTLY), (rates(4, 4.1, 4.2), PARTLY), (rates(0.3, 1, 3), OPEN),
           (rates(0.2, 0.3, 0.4), NO), (rates(30, 1e4, 30), NOT_YET),
           (rates(30, None, 9), NOT_YET)],
    "T8": [(alphas(0.2, 0.1, 0.3, 0.3), YES, 1), (alphas(0.2, 0.105, 0.1, 0.3), YES, 1.05),
           (alphas(0.2, 0.105, 0.1, None), YES), (alphas(0.2, 0.12, 0.1, 0.3), PARTLY, 1.2),
           (alphas(0.2, 0.105, 0.1, 0.3, apart=1.1), PARTLY), (alphas(0.2, 0.1, 0.3, 0.09), OPEN),
           (alphas(0.102, 0.1, 0.3, 0.2, apart=1.03), PARTLY),
           (alphas(0.11, 0.12, 0.1, 0.115), NO), (alphas(0.2, 0.3, 0.1, 0.2), NO)],
    "T9": [(optimizers(25), YES, 7.5), (optimizers(99), PARTLY), (optimizers(101), NO)],
    "T10": [(disk(), YES, 7), (disk(merged=13.4), PARTLY, 7),
            (disk(merged=13.4, int8=6, half=0.08), NO, 6)],
    "T11": [(outliers([0.2, 0.3, 0.4], 5), YES), (outliers([0.09, 0.3, 0.2], 5), PARTLY),
            (outliers([0.05, 0.06, 0.07], 5), NO), (outliers([0.1, 0.1, 0.1], 0), NO, 1)],
    "T12": [(serving(5, 90, 6), PARTLY, 5), (serving(1, 90, 6), YES, 1),
            (serving(5, 60, 6), NO, 5), (serving(5, 90, 12), NO, 5)],
    "T13": [(sizes(devices_gb={"a": 12, "b": 9}), ledger.COMPUTED, 8),
            (sizes(devices_gb={"a": 12, "b": 7.5}), PARTLY, 8), (sizes(devices_gb={"a": 4}), NO)],
    "T14": [(modes(90, 90, 0.01), YES, 0), (modes(90, 90, 0.5), PARTLY, 0),
            (modes(70, 90, 0.01), PARTLY, 20), (modes(87, 90, 0.5), OPEN, 3),
            (modes(87, 90, 0.01), PARTLY, 3), (modes(90, 70, 0.5), NO, 0),
            (modes(99, 99, 0.01), YES, -9)],
    "T15": [(load(500, 20), YES, 9), (load(500, 2000), PARTLY), (load(499, 20), NO)],
    "T16": [(page("TypeError", False, True), NO, 1), (page("", False, False), YES, 0),
            (page("no gpu", True, True), ledger.NOT_HERE, 0), (page("", False, True), PARTLY, 0)],
    "P1": [(joint("coa", 0.1, 60) | bare(4.0), YES, 100), (joint("coa", 0.1, 36) | bare(4.0), NO),
           (joint("coa", 4.0, 60) | bare(4.0), NO, 100)],
    "P2": [(joint("coa", loss, right) | joint("dedicated", 0.1, 40), verdict, loss / 0.1)
           for loss, right, verdict in ((0.1, 40, YES), (0.1, 10, PARTLY), (0.4, 40, PARTLY),
                                        (0.4, 10, NO), (0.112, 40, PARTLY))],
    "P3": [(switching([-0.1, 0.01], 1000), YES, 1.1), (switching([-0.1, 0.01], 10), PARTLY),
           (switching([-0.1, 0.1], 1000), PARTLY), (switching([0.1, 0.2], 10), NO, 1.1)],
    "P4": [(searched(3, 1, 2), YES), (searched(0, 0, 0), NO), (searched(2, 1, 2), PARTLY),
           (searched(2, 2, 2), OPEN), (searched(1, 2, 1), NO)],
    "P5": [(joint("coa", loss, right) | joint("lora", 0.1, 40), verdict, loss / 0.1)
           for loss, right, verdict in ((0.05, 40, YES), (0.1, 60, YES), (0.1, 40, OPEN),
                                        (0.05, 10, PARTLY), (0.4, 40, NO))],
    "F1": [(forgotten(0.5, 70), YES), (forgotten(0.5, 90), PARTLY), (forgotten(0.5, 99), PARTLY),
           (forgotten(2, 70), NO), (forgotten(0.9, 90), OPEN), (forgotten(0.9, 70), PARTLY)],
    "F2": [(batched(4, 60), YES), (batched(4, 90), PARTLY), (batched(1, 60), PARTLY),
           (batched(1, 99), NO), (batched(2, 90, apart=1.2), OPEN), (at_an_end(), NOT_YET)],
}


@pytest.mark.parametrize(("name", "case"), [(n, case) for n in CASES for case in CASES[n]])
def test_verdicts(tmp_path, name, case):
    files, verdict, *value = case
    entry = judge(name, tmp_path, files)
    assert entry["verdict"] == verdict
    assert not value or entry["value"] == pytest.approx(value[0], abs=1e-9)
    assert not entry["interval"] or (
        entry["interval"][0] <= entry["value"] <= entry["interval"][1])


def curve(*right: int) -> Files:
    """Runs on 100, 300, 1,000, 1,600 examples, and 5,000 beside 1,600 with the same steps."""
    names = (*tutorial.CURVE.values(), *tutorial.LONGER)
    files = {name: run(r) for name, r in zip(names, right, strict=False)}
    return files | {"base": {"course": run(2)}} | {
        name: run(r, r - 3) for name, r in zip(tutorial.ALIKE, (95, 94, 91), strict=True)}


@pytest.mark.parametrize(("right", "enough", "verdict"), [
    ((20, 40, 60, 70, 95, 70), 5000, YES), ((20, 60, 94, 95, 95, 95), 1000, OPEN),
    ((20, 80, 99, 84, 84, 84), 1000, OPEN),  # 1,000 is clearly better than 300
    ((20, 60, 94, 95), 1000, OPEN), ((20, 40, 60, 95), None, NOT_YET),
    ((20, 60, 80, 81, 95, 95), 1000, OPEN),  # more steps are not more examples
    ((1, 1, 1, 1, 1, 1), 100, NO)])
def test_t6(tmp_path, right, enough, verdict):
    entry = judge("T6", tmp_path, curve(*right))
    assert (entry["verdict"], entry["value"]) == (verdict, enough)
    largest = "1,600" if len(right) == 4 else "5,000"
    assert verdict == NOT_YET or f"Not tried: more than {largest} examples" in entry["finding"]


def test_t6_also_needs_new_phrasings_and_one_dtype(tmp_path):
    files = curve(20, 95, 95, 95) | {"curve_300": run(95, 60)}
    assert judge("T6", tmp_path, files)["value"] == 1000
    entry = judge("T6", tmp_path, {"curve_1000": run(94, dtype="bfloat16")})
    assert entry["verdict"] == NOT_YET and "curve_1000 in bfloat16" in entry["finding"]


def test_t14_compares_the_cost_of_runs_of_one_seed(tmp_path):
    """Different seeds may have run on machines of different speed; a pair has not."""
    files = sizes() | {name: run(99, seconds=7) for name in tutorial.of_seeds("full")}
    for name, slow in (("", 1), ("_1", 4), ("_2", 16)):
        files |= {f"full_1e-4{name}": run(90, seconds=100 * slow),
                  f"lora{name}": run(90, seconds=(50 if slow == 16 else 40) * slow)}
    assert "40 % [40 %, 50 %] of the time" in judge("T14", tmp_path, files)["finding"]


def test_a_claim_waits_for_its_seeds_and_old_pieces_are_made_again(tmp_path):
    entry = judge("T14", tmp_path, sizes() | {"full": run(95), "lora": run(90)})
    assert (entry["verdict"], entry["value"], len(entry["evidence"])) == (NOT_YET, None, 3)
    assert entry["finding"] == "Still to be made: full_1, full_2, ..., full_1e-4_2."
    entry = judge("T5", tmp_path, targets(50, 1.0) | {"targets_speed": {}})
    assert entry["finding"] == "A stored piece lacks 'aggressive_step_ratio': make it again."


def test_an_open_claim_says_how_many_seeds_would_narrow_it(tmp_path):
    """t(n - 1) / sqrt(n), half a width in standard deviations, is 2.484 at n = 3, 0.715 at 10."""
    assert ledger.seeds_needed(ledger.Interval(0, -2.48, 2.48), 2.49) == 3
    assert ledger.seeds_needed(ledger.Interval(0, -2.484, 2.484), 0.72) == 10
    files = sizes() | {f"{name}{seed}": run(90 + 3 * i * (name == "full"))
                       for name in ("full", "lora", "full_1e-4")
                       for i, seed in enumerate(("", "_1", "_2"))}
    entry = judge("T14", tmp_path, files)
    assert re.search(r"full minus LoRA to 2 points takes at least \d+ seeds", entry["finding"])


def test_p1_says_which_configuration_is_worst_and_what_more_steps_give(tmp_path):
    files = joint("coa", 0.1, 60) | bare(40.0)
    files["coa__sensors-coa-1"]["plans"]["random 6"]["loss"] = 23.0
    del files["coa__sensors-coa-0"]["plans"]["greedy 2.5"]["score"]  # its loss was hopeless
    entry = judge("P1", tmp_path, files)
    assert entry["verdict"] == PARTLY and "5 of 6" in entry["headline"]
    assert "at worst 23.0 nats (random 6 bits)" in entry["finding"]
    longer = joint("long", 0.1, 60, steps=260)
    assert "after 260 steps: useful at 6 of 6" in judge("P1", tmp_path, longer)["details"]


def test_joint_claims_need_all_seeds_and_one_training_set(tmp_path):
    alone = joint("dedicated", 0.1, 40)
    last = alone.popitem()
    entry = judge("P2", tmp_path, joint("coa", 0.4, 10) | alone)
    assert entry["finding"] == f"Still to be made: {last[0].replace('__', '/')}."
    longer = {"coa__sensors-long-0": rows(0.1, 40, steps=260)}
    entry = judge("P2", tmp_path, dict([last]) | longer)
    assert "in 2.6 times the steps (1 of 3 seeds), sensors: 1.00 " in entry["finding"]
    files = joint("lora", 0.1) | {"coa__sensors-lora-1": rows(0.1) | {"training_plans": "old"}}
    assert "different configurations" in judge("P5", tmp_path, files)["finding"]


def test_open_halves_are_said_to_be_open(tmp_path):
    finding = judge("T14", tmp_path, modes(87, 90, 0.5))["finding"]
    assert "The quality half is open: full minus LoRA is +3.0" in finding
    assert "The cost half fails: LoRA takes 50 %" in finding
    finding = judge("T14", tmp_path, modes(90, 90, 0.01))["finding"]
    assert "The quality half holds" in finding and "The cost half holds" in finding
    assert "(no clear difference)" in judge("T5", tmp_path, targets(50, 1.0))["finding"]
    assert "(no clear difference)" not in judge("T5", tmp_path, targets(50, 1.2))["finding"]


@pytest.mark.parametrize(("parts", "verdict"), [
    ((True, True), YES), ((True, False), PARTLY), ((True, None), PARTLY), ((None, False), OPEN),
    ((None, None), OPEN), ((False, False), NO), ((None,), OPEN)])
def test_parts_that_hold_fail_or_are_open(parts, verdict):
    assert ledger.of_parts(*parts) == verdict


@pytest.mark.parametrize(("verdicts", "one"), [
    ((YES, YES), YES), ((YES, NO), PARTLY), ((YES, OPEN), PARTLY), ((PARTLY, OPEN), PARTLY),
    ((OPEN, NO), OPEN), ((OPEN, OPEN), OPEN), ((NO, NO), NO), ((PARTLY, YES), PARTLY)])
def test_one_verdict_over_tasks(verdicts, one):
    assert paper.over_tasks(verdicts) == paper.over_tasks(verdicts[::-1]) == one


def test_p2_worse_in_loss_with_an_open_score_is_inconclusive(tmp_path):
    files = joint("coa", 0.4, 38) | joint("dedicated", 0.1, 40)
    assert judge("P2", tmp_path, files)["verdict"] == OPEN


def test_tasks_that_differ_make_a_claim_partly_right(tmp_path):
    alone = judge("P5", tmp_path, joint("coa", 0.05) | joint("lora", 0.1))
    movies = joint("coa", 0.4, task="movies") | joint("lora", 0.1, task="movies")
    both = judge("P5", tmp_path, movies)
    assert (alone["verdict"], both["verdict"]) == (YES, PARTLY)
    assert len(both["evidence"]) == 12 and "times the steps" not in both["details"]
    longer = joint("long", 0.02, steps=260) | joint("lora-long", 0.08, steps=260)
    finding = judge("P5", tmp_path, longer)["details"]
    assert "both in 2.6 times the steps, sensors: 0.25 " in finding
    assert "0.25 [0.25, 0.25] with the configurations held fixed" in finding


def test_p5_looks_separately_at_random_configurations_of_few_bits(tmp_path):
    files = joint("coa", 0.1) | joint("lora", 0.1)
    for name, row in files.items():
        broken = 0.2 if "-coa-" in name else 3.0
        row["plans"] |= rows(broken, only=("more random 2.93",))["plans"]
    entry = judge("P5", tmp_path, files)
    assert "sensors: 0.68 " in entry["finding"]
    assert "1.00 [1.00, 1.00] without random ones below 4 bits (1 of them)" in entry["details"]


def test_p4_compares_only_searches_from_one_start(tmp_path):
    files = searched(3, 1, 2)
    files["search__random-1"] |= {"without_search": 29.0}
    assert judge("P4", tmp_path, files)["verdict"] == NOT_YET


@pytest.mark.parametrize("name", RULES)
def test_every_rule_waits_for_results_and_has_none_of_its_own(tmp_path, name):
    """A headline's source has no number of its own, apart from names."""
    entry = judge(name, tmp_path, {})
    assert (entry["verdict"], entry["value"], entry["evidence"]) == (NOT_YET, None, [])
    names = re.compile(r"Q8_0|INT8|bf16|\bA x B\b")
    for node in ast.walk(ast.parse(inspect.getsource(RULES[name].judge))):
        text = None
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "headline":
            text = node.value
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Judgement":
            text = node.args[1]
        if isinstance(text, ast.JoinedStr):
            words = "".join(part.value for part in text.values if isinstance(part, ast.Constant))
            assert not re.search(r"\d", names.sub("", words)), words
