"""The ledger of claims: it fits the stored results, and its rules can say every verdict."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import claims_paper as paper
import claims_tutorial as tutorial
import ledger
import make
import nbformat
import picture
import pytest
import torch
from conftest import ROOT
from ledger import (
    COMPUTED,
    CORRECTED,
    NOT_HERE,
    NOT_YET,
    REFUTED,
    REPRODUCED,
    RULES,
    SEEDS,
    Stored,
)

from lib.artifacts import read_json
from lib.compare import MAIN
from lib.plans import random_plan

IDS = [f"T{i}" for i in range(1, 17)] + [f"P{i}" for i in range(1, 6)]
KEYS = ["id", "source", "claim", "method", "value", "unit", "interval", "finding", "verdict",
        "evidence", "command"]


@pytest.fixture(scope="module")
def stored() -> list[dict[str, Any]]:
    return read_json(ledger.CLAIMS)


def test_every_claim_stands_there_once(stored):
    assert [c["id"] for c in stored] == IDS
    for c in stored:
        assert list(c) == KEYS
        assert c["source"] == ("tutorial" if c["id"][0] == "T" else "paper")
        assert c["verdict"] in ledger.VERDICTS
        assert c["claim"].endswith(".") and c["method"].endswith(".")
        assert c["finding"].endswith(".") and "\u2014" not in json.dumps(c, ensure_ascii=False)
        assert c["interval"] is None or c["interval"][0] <= c["value"] <= c["interval"][1]


def test_the_ledger_is_what_the_results_say_now(stored):
    """Made again by `python data/results/claims.py` when this fails."""
    assert stored == json.loads(json.dumps(ledger.entries(Stored())))


def test_evidence_is_there_and_names_its_command(stored):
    for c in stored:
        assert len(c["evidence"]) == len(c["command"])
        assert c["evidence"] or c["verdict"] == NOT_YET
        for file, command in zip(c["evidence"], c["command"], strict=True):
            made = read_json(ROOT / file)
            assert command == made["command"]
            script, name = re.fullmatch(r"python (data/results/\w+\.py) (\S+)", command).groups()
            assert (ROOT / script).is_file() and Path(file).stem == name


def test_films_are_scored_at_every_main_plan():
    """One word is right by luck in half of them: what is not scored cannot count as wrong."""
    for file in make.RESULTS.glob("coa/movies-*-[0-9].json"):
        rows = read_json(file)["result"]["plans"]
        assert all("score" in rows[plan] for plan in MAIN if plan in rows), file.name


def test_the_last_notebook_shows_the_ledger(stored):
    """Stored again by `python -m lib run --only 06 --store` when this fails."""
    book = nbformat.read(ROOT / "notebooks" / "06_evaluation.ipynb", as_version=4)
    shown = "\n".join(output.get("data", {}).get("text/markdown", "")
                      for cell in book.cells for output in cell.get("outputs", []))
    for c in stored:
        row = f"| {c['id']} | {c['claim']} | **{c['verdict']}** | {c['finding']} |"
        assert row in shown, c["id"]


def test_what_is_missing_has_no_number(stored):
    for c in stored:
        if c["verdict"] == NOT_YET:
            words = re.sub(r"\S*[/_]\S+", "", c["finding"])  # names of pieces
            assert c["value"] is None and c["interval"] is None
            assert not re.search(r"\d", words), c["finding"]


def test_the_readme_shows_the_ledger():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"<!-- claims -->\n{ledger.claims_table()}\n<!-- end of claims -->" in readme
    # The main results come first.
    assert readme.index("<!-- results -->") < readme.index("<!-- claims -->")


def test_the_model_card_has_every_adapter_and_the_stored_scores():
    card = (make.ADAPTERS / "README.md").read_text(encoding="utf-8")
    assert f"<!-- card -->\n{make.card_table()}\n<!-- end of card -->" in card
    shipped = {path.name for path in make.ADAPTERS.iterdir() if path.is_dir()}
    assert shipped == set(re.findall(r"`(\w+_(?:coa|lora|qlora))`", card))
    for word in ("**Data.**", "**Use.**", "**Not for**", "**Limits.**", "license: apache-2.0"):
        assert word in card


def test_the_readmes_picture_shows_the_stored_results(tmp_path):
    """Drawn again by `python data/results/make.py readme` when this fails."""
    numbers = picture.drawn(make.RESULTS)
    assert picture.stamp() == picture.digest(numbers)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme.index(picture.PICTURE.relative_to(ROOT).as_posix())
    assert shown < readme.index("<!-- results -->")
    picture.draw(make.RESULTS, tmp_path / "again.png")
    assert picture.stamp(tmp_path / "again.png") == picture.stamp()
    assert picture.digest(numbers | {"files": {}}) != picture.stamp()


def test_stored_levels_are_those_that_are_built(tiny_directory, tmp_path, monkeypatch):
    """Read back from their files they are equal to the last bit; a second model builds none."""
    import coa

    monkeypatch.setattr(coa, "BUILD", tmp_path)
    base = coa.Stored.load(tiny_directory)
    plan = random_plan(base.layers, 4.0, random.Random(0))
    base.switch(plan)
    built = [base.weight(i, level) for i, level in enumerate(plan.levels)]
    made = [path.suffix for path in tmp_path.rglob("*") if path.is_file()]
    assert made == [".bin"] * len(plan.levels)
    again = coa.Stored.load(tiny_directory)
    monkeypatch.setattr(again, "_rounded", None)
    again.switch(plan)
    for name, weight in zip(plan.layers.names, built, strict=True):
        ours = again.model.get_submodule(name).weight
        assert torch.equal(ours, weight.to(ours))


def test_rules_name_pieces_that_can_be_made():
    import coa
    import search

    known = {*make.PIECES, *(f"coa/{n}" for n in coa.pieces()),
             *(f"search/{n}" for n in search.PIECES)}
    for one in RULES.values():
        assert {*one.needs, *one.also} <= known, one.id
        assert one.needs and not {*one.needs} & {*one.also}
    assert coa.SEEDS == SEEDS
    assert (paper.METHODS, paper.SEARCHES) == (search.METHODS, search.ALL_SEEDS)


def test_the_curve_compares_runs_of_as_many_steps():
    """Only the number of examples differs; of the last two, too."""
    for names in (tutorial.CURVE.values(), tutorial.LONGER):
        made = [make.variants()[name] for name in names]
        assert len({v["steps"] for v in made}) == 1
        assert all(v.keys() == {"mode", "examples", "steps"} for v in made)
    assert [make.variants()[n]["examples"] for n in tutorial.CURVE.values()] == [*tutorial.CURVE]


def put(folder: Path, **files: Any) -> Stored:
    """Made-up results; two underscores stand for a folder."""
    for name, result in files.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"command": f"python data/results/x.py {path.stem}",
                                    "machine": {"dtype": result.pop("dtype", "float32")},
                                    "result": result}))
    return Stored(folder)


def judge(name: str, folder: Path, **files: Any) -> dict[str, Any]:
    return ledger.entry(RULES[name], put(folder, **files))


def score(right: int, of: int = 100) -> dict[str, Any]:
    """The first `right` examples are right."""
    return {"hits": "1" * right + "0" * (of - right), "share": right / of,
            "low": max(0, right / of - 0.05), "high": min(1, right / of + 0.05)}


def run(right: int, other: int | None = None, **cost: float) -> dict[str, Any]:
    return {"test": score(right), "test_phrasings": score(right if other is None else other),
            "peak_mb": 1000, "seconds": 100, "saved_mb": 10, "mb": 10,
            "settings": {"rank": 16}} | cost


def sizes(**changes: Any) -> dict[str, Any]:
    """What the piece `sizes` would hold if the tutorial were right in all."""
    row = {"parameters": 6_000_000_000, "packed": 3_540_262_912, "peft": 13_631_488,
           "adapters": {"minimal": 5_000_000, "standard": 13_631_488, "aggressive": 30_000_000}}
    memory = {"full, mixed precision": 110, "full, pure bf16": 90, "LoRA": 13, "QLoRA": 3}
    return {"models": {"Llama-2-7B": row},
            "memory_gb": {name: {"sum": gb} for name, gb in memory.items()}, "batch_gb": 2.0,
            "files_gb": {"adapter, float32": 0.1, "adapter, float16": 0.05, "merged": 14.0,
                         "int8": 7.0, "cache": 1.0},
            "embedded_mb": {"adapter, float32": 10, "merged": 10, "int8": 10},
            "devices_gb": {"one": 12, "other": 24},
            "update": {"A": [16, 8], "B": [8, 16], "before": 64, "after": 32,
                       "error_without_scale": 0.0, "error_with_scale": 0.0},
            "optimizers": {"paged": "no", "mb": {"lora": {"32": 100, "8": 25},
                                                 "full": {"32": 400, "8": 100}}}} | changes


def model(adapters: tuple[int, int, int], **changes: int) -> dict[str, Any]:
    row = sizes()["models"]["Llama-2-7B"] | changes
    return {"models": {"Llama-2-7B": row | {"adapters": dict(zip(
        ("minimal", "standard", "aggressive"), adapters, strict=True))}}}


@pytest.mark.parametrize(("adapters", "verdict"), [
    ((5_000_000, 16_000_000, 40_000_000), REPRODUCED),
    ((8_000_000, 30_000_000, 40_000_000), REFUTED),
    ((12_000_000, 30_000_000, 40_000_000), CORRECTED)])
def test_t1(tmp_path, adapters, verdict):
    assert judge("T1", tmp_path, sizes=sizes(**model(adapters)))["verdict"] == verdict


@pytest.mark.parametrize(("changed", "verdict"), [
    ({}, COMPUTED), ({"full, pure bf16": 50}, CORRECTED), ({"QLoRA": 5}, CORRECTED),
    ({"LoRA": 17}, REFUTED), ({"full, mixed precision": 70}, REFUTED)])
def test_t2(tmp_path, changed, verdict):
    memory = sizes()["memory_gb"] | {name: {"sum": gb} for name, gb in changed.items()}
    made = judge("T2", tmp_path, sizes=sizes(memory_gb=memory), full=run(1), lora=run(1),
                 qlora=run(1))
    assert made["verdict"] == verdict


@pytest.mark.parametrize(("bare", "scaled", "verdict"), [
    (0, 0.5, REPRODUCED), (0.5, 0, CORRECTED), (0.5, 0.5, REFUTED)])
def test_t3(tmp_path, bare, scaled, verdict):
    update = sizes()["update"] | {"error_without_scale": bare, "error_with_scale": scaled}
    made = judge("T3", tmp_path, sizes=sizes(update=update))
    assert (made["verdict"], made["value"]) == (verdict, 2)


@pytest.mark.parametrize(("peft", "packed", "verdict"), [
    (13_631_488, 3_540_262_912, REPRODUCED), (13_631_488, 1, CORRECTED),
    (16_777_216, 3_540_262_912, REFUTED)])
def test_t4(tmp_path, peft, packed, verdict):
    row = model((1, peft, 3), peft=peft, packed=packed)
    assert judge("T4", tmp_path, sizes=sizes(**row))["verdict"] == verdict


@pytest.mark.parametrize(("minimal", "slower", "verdict"), [
    (50, 1.2, REPRODUCED), (50, 1.0, CORRECTED), (89, 1.2, CORRECTED), (89, 1.0, REFUTED)])
def test_t5(tmp_path, minimal, slower, verdict):
    speed = {"aggressive_step_ratio": slower,
             "aggressive_step_ratio_spread": [slower - 0.1, slower]}
    made = judge("T5", tmp_path, targets_minimal=run(minimal), targets_speed=speed,
                 targets_standard=run(80), lora=run(90))
    assert made["verdict"] == verdict
    assert made["finding"].endswith("not run: rank_4, rank_64.")
    assert made["interval"][0] <= made["value"] == 90 - minimal <= made["interval"][1]


def curve(*right: int) -> dict[str, Any]:
    """Files of 100, 300, 1,000 and 1,600 examples, and 5,000 beside 1,600 seen as long."""
    names = (*tutorial.CURVE.values(), *tutorial.LONGER)
    return {name: run(r) for name, r in zip(names, right, strict=False)} | {
        name: run(r, r - 3) for name, r in zip(tutorial.ALIKE, (95, 94, 91), strict=True)}


@pytest.mark.parametrize(("right", "enough", "verdict"), [
    ((20, 40, 60, 70, 95, 70), 5000, REPRODUCED), ((20, 60, 94, 95, 95, 95), 1000, CORRECTED),
    ((20, 80, 99, 84, 84, 84), 1000, CORRECTED),  # 1,000 is clearly better than 300
    ((20, 60, 94, 95), 1000, CORRECTED), ((20, 40, 60, 95), None, NOT_YET),
    ((20, 40, 60, 95, 95, 96), 1600, CORRECTED),
    ((20, 60, 80, 81, 95, 95), 1000, CORRECTED),  # more steps are no more examples
    ((1, 1, 1, 1, 1, 1), 100, REFUTED)])
def test_t6(tmp_path, right, enough, verdict):
    made = judge("T6", tmp_path, base={"course": run(2)}, **curve(*right))
    assert (made["verdict"], made["value"]) == (verdict, enough)
    assert ("not run" in made["finding"]) == (len(right) == 4 and verdict != NOT_YET)
    if verdict != NOT_YET:
        assert "own seed and draw, differ by up to 4.0 and 4.0 points" in made["finding"]


def test_enough_for_the_test_may_be_too_little_for_new_phrasings(tmp_path):
    rows = curve(20, 95, 95, 95)
    rows["curve_300"] = run(95, 60)
    made = judge("T6", tmp_path, base={"course": run(2)}, **rows)
    assert (made["verdict"], made["value"]) == (CORRECTED, 1000)


def test_a_curve_is_of_one_dtype(tmp_path):
    """Only the number of examples may differ."""
    rows = curve(20, 60, 94, 95)
    rows["curve_1000"]["dtype"] = "bfloat16"
    made = judge("T6", tmp_path, base={"course": run(2)}, **rows)
    assert made["verdict"] == NOT_YET and "curve_1000 in bfloat16" in made["finding"]


def rates(lora: list[float | None], full: list[float | None]) -> dict[str, Any]:
    rows = {f"lora {rate:g}": loss for rate, loss in zip((1e-4, 1e-3, 1e-2), lora, strict=True)}
    rows |= {f"full {rate:g}": loss for rate, loss in zip(
        (1e-5, 1e-4, 1e-3), full, strict=True)}
    return {"learning_rate": {n: {"validation_loss": loss} for n, loss in rows.items()}}


@pytest.mark.parametrize(("lora", "full", "verdict"), [
    ([1, 0.1, 0.5], [1, 0.1, 0.5], CORRECTED), ([1, 0.1, None], [1, 0.1, 0.5], CORRECTED),
    ([1, 0.5, 0.1], [1, 0.1, 0.5], NOT_YET)])
def test_t7(tmp_path, lora, full, verdict):
    made = judge("T7", tmp_path, sweeps=rates(lora, full))
    assert made["verdict"] == verdict
    if verdict == CORRECTED:
        assert (made["value"], made["interval"]) == (pytest.approx(10), pytest.approx([0.1, 1000]))
        assert "one seed" in made["finding"] and "10.0 times its best" in made["finding"]


def test_t7_is_reproduced_only_where_the_grid_leaves_nothing_else_open(tmp_path):
    def found(*lora: float) -> str:
        rows = {f"lora {rate:g}": {"validation_loss": abs(math.log(rate / lora[1])) + 0.1}
                for rate in lora} | {f"full {rate:g}": {"validation_loss": abs(rate - 1) + 0.1}
                                     for rate in (0.5, 1, 2)}
        return judge("T7", tmp_path, sweeps={"learning_rate": rows})["verdict"]

    assert found(20, 30, 40) == REPRODUCED and found(10, 30, 40) == CORRECTED
    assert found(20, 30, 60) == CORRECTED


def test_t7_says_when_the_rates_are_near_or_the_wrong_way_round(tmp_path):
    rows = {f"{mode} {rate:g}": {"validation_loss": 1 + abs(rate - best)}
            for mode, best in (("lora", 3), ("full", 1)) for rate in (0.1, 0.5, 1, 3, 9)}
    assert judge("T7", tmp_path, sweeps={"learning_rate": rows})["verdict"] == CORRECTED
    swapped = {{"lora": "full", "full": "lora"}[n[:4]] + n[4:]: r for n, r in rows.items()}
    assert judge("T7", tmp_path, sweeps={"learning_rate": swapped})["verdict"] == REFUTED


@pytest.mark.parametrize(("losses", "verdict"), [
    ((0.2, 0.1, 0.2), REPRODUCED), ((0.2, 0.105, 0.1), CORRECTED), ((0.3, 0.2, 0.1), CORRECTED),
    ((0.1, 0.2, 0.15), REFUTED), ((None, 0.1, 0.15), REPRODUCED)])
def test_t8(tmp_path, losses, verdict):
    rows = {f"alpha {a}": {"validation_loss": x}
            for a, x in zip((8, 32, 128), losses, strict=True)}
    assert judge("T8", tmp_path, sweeps={"alpha": rows})["verdict"] == verdict


def test_t8_takes_the_mean_of_its_seeds(tmp_path):
    def rows(*losses):
        return {"alpha": {f"alpha {a}": {"validation_loss": x}
                          for a, x in zip((8, 32, 128), losses, strict=True)}}

    made = judge("T8", tmp_path, sweeps=rows(0.3, 0.2, 0.1), sweeps_1=rows(0.3, 0.1, 0.2),
                 alpha={"rank 4": {"alpha 2r": {"validation_loss": 0.3},
                                   "rslora 8": {"validation_loss": 0.2}}})
    assert (made["verdict"], made["value"]) == (REPRODUCED, 1)
    assert "2 seeds" in made["finding"] and "at rank 4 alpha = 2 r has 1.50" in made["finding"]


@pytest.mark.parametrize(("mb", "verdict"), [(25, REPRODUCED), (99, CORRECTED), (101, REFUTED)])
def test_t9(tmp_path, mb, verdict):
    optimizers = {"paged": "", "mb": {"lora": {"32": 100, "8": mb}, "full": {"32": 4, "8": 1}}}
    made = judge("T9", tmp_path, sizes=sizes(optimizers=optimizers), lora=run(1), full=run(1))
    assert made["verdict"] == verdict and "CUDA" not in made["finding"]


@pytest.mark.parametrize(("changed", "verdict"), [
    ({}, REPRODUCED), ({"merged": 13.4}, CORRECTED),
    ({"merged": 13.4, "int8": 6, "adapter, float16": 0.08}, REFUTED)])
def test_t10(tmp_path, changed, verdict):
    pipeline = {"dequantized": run(1), "int8": run(1)}
    made = judge("T10", tmp_path, sizes=sizes(files_gb=sizes()["files_gb"] | changed),
                 pipeline=pipeline, lora=run(1))
    assert made["verdict"] == verdict


@pytest.mark.parametrize(("without", "inputs", "verdict"), [
    ([0.2, 0.3, 0.4], 5, REPRODUCED), ([0.09, 0.3, 0.2], 5, CORRECTED),
    ([0.05, 0.06, 0.07], 5, REFUTED), ([0.1, 0.1, 0.1], 0, REFUTED)])
def test_t11(tmp_path, without, inputs, verdict):
    row = {"inputs": 10, "with_outliers": inputs, "products_in_8_bits": 0.98, "error_ratio": 1.5,
           "weights_in_float": 0, "losses": {"none": without, "6.0": [0.1, 0.1, 0.1]}}
    assert judge("T11", tmp_path, outliers=row)["verdict"] == verdict


@pytest.mark.parametrize(("times", "right", "mb", "verdict"), [
    (5, 90, 6, CORRECTED), (1, 90, 6, REPRODUCED), (5, 60, 6, REFUTED), (5, 90, 12, REFUTED)])
def test_t12(tmp_path, times, right, mb, verdict):
    serving = {"ratio": times, "ratio_spread": [times - 0.5, times + 0.5],
               "bnb_int8_tokens_per_s": 10, "q8_tokens_per_s": 10 * times}
    made = judge("T12", tmp_path, serving=serving, edge={"Q8_0": run(90)},
                 pipeline={"dequantized": run(90), "int8": run(right, mb=mb)})
    assert made["verdict"] == verdict


@pytest.mark.parametrize(("devices", "verdict"), [
    ({"a": 12, "b": 9}, COMPUTED), ({"a": 12, "b": 7.5}, CORRECTED), ({"a": 4}, REFUTED)])
def test_t13(tmp_path, devices, verdict):
    assert judge("T13", tmp_path, sizes=sizes(devices_gb=devices))["verdict"] == verdict


@pytest.mark.parametrize(("lora", "phrasings", "cost", "verdict"), [
    (90, 90, 0.01, REPRODUCED), (90, 90, 0.5, CORRECTED), (70, 90, 0.01, CORRECTED),
    (87, 90, 0.5, CORRECTED), (87, 90, 0.01, CORRECTED),
    (90, 70, 0.5, REFUTED), (99, 99, 0.01, REPRODUCED)])
def test_t14(tmp_path, lora, phrasings, cost, verdict):
    cheap = {"peak_mb": 1000 * cost, "seconds": 100 * cost, "saved_mb": 10 * cost}
    files = {name: run(lora, phrasings, **cheap) for name in ("lora", "lora_1", "lora_2")}
    files |= {name: run(90) for name in (*tutorial.of_seeds("full"),
                                         *tutorial.of_seeds(tutorial.SLOWER))}
    made = judge("T14", tmp_path, sizes=sizes(), **files)
    assert made["verdict"] == verdict
    assert made["interval"][0] <= made["value"] == 90 - lora <= made["interval"][1]
    assert "QLoRA" not in made["finding"].partition("not run")[0]


def test_the_modes_are_compared_at_the_best_rates_of_the_sweep():
    found = make.read_json(make.RESULTS / "sweeps.json")["result"]["learning_rate"].values()
    for mode in ("lora", "full"):
        tried = {row["settings"]["learning_rate"]: row["validation_loss"] for row in found
                 if row["settings"]["mode"] == mode and row["validation_loss"]}
        for name in tutorial.of_seeds(mode):
            row = make.read_json(make.RESULTS / f"{name}.json")["result"]
            assert row["settings"]["learning_rate"] == min(tried, key=lambda x: tried[x]), name


def test_t14_compares_the_cost_of_runs_of_one_seed(tmp_path):
    """Seeds may be made on machines of other speeds; a pair is not."""
    files = {name: run(99, seconds=7) for name in tutorial.of_seeds("full")}
    for name, slow in (("", 1), ("_1", 4), ("_2", 16)):
        files |= {f"full_1e-4{name}": run(90, seconds=100 * slow),
                  f"lora{name}": run(90, seconds=(50 if slow == 16 else 40) * slow)}
    made = judge("T14", tmp_path, sizes=sizes(), **files)["finding"]
    assert "40 % [40 %, 50 %] of the time" in made
    files["lora_1"], files["full_1e-4_1"] = run(90, seconds=1), run(90, seconds=1000)
    made = judge("T14", tmp_path, sizes=sizes(), **files)["finding"]
    assert "40 % [0 %, 50 %] of the time" in made


def test_t14_waits_for_its_seeds_and_then_judges(tmp_path):
    first = judge("T14", tmp_path, sizes=sizes(), full=run(95), lora=run(90))
    assert first["verdict"] == NOT_YET and first["value"] is None
    assert first["finding"] == "Still to be made: full_1, full_2, ..., full_1e-4_2."
    assert len(first["evidence"]) == 3
    rest = {f"{mode}_{seed}": run(90) for mode in (*make.MODES, "full_1e-4") for seed in (1, 2)}
    rest["full_1e-4"] = run(90)
    whole = judge("T14", tmp_path, qlora=run(80), **rest)
    assert whole["verdict"] == CORRECTED and "LoRA less QLoRA +3.3" in whole["finding"]


@pytest.mark.parametrize(("own", "high", "verdict"), [
    (500, 20, REPRODUCED), (500, 2000, CORRECTED), (499, 20, REFUTED)])
def test_t15(tmp_path, own, high, verdict):
    load = {"requests": 500, "answered": 500, "with_own_adapter": own, "clients": 16}
    made = judge("T15", tmp_path, load=load,
                 serving={"swap_ms": 9.0, "swap_ms_spread": [-3, high]})
    assert made["verdict"] == verdict


@pytest.mark.parametrize(("error", "gpu", "fault", "verdict"), [
    ("TypeError: no", False, True, REFUTED), ("ValueError: no gpu", True, True, NOT_HERE),
    ("", False, True, CORRECTED), ("", False, False, REPRODUCED)])
def test_t16(tmp_path, error, gpu, fault, verdict):
    row = {"error": error, "wants_gpu": gpu}
    page = {"calls": {"one": row}, "arguments": {"a": row}, "faults": {"f": fault}}
    made = judge("T16", tmp_path, page=page)
    assert (made["verdict"], made["value"]) == (verdict, int(verdict == REFUTED))


def plans(loss: float, right: int = 32, plan: str = "p", only: tuple[str, ...] = MAIN
          ) -> dict[str, Any]:
    """A stored run of coa.py; losses spread a little, so that intervals have a width."""
    return {"seconds": 100, "losses": [1.0] * 100, "plans": {name: {
        "plan": plan, "bits": float(name.split()[-1]), "loss": loss,
        "losses": [loss * x for x in (0.9, 1.0, 1.1)],
        "score": score(right, 64)} for name in only}}


def made_by(task: str, method: str, *row: Any) -> dict[str, Any]:
    if method == "dedicated":
        return {f"coa__{task}-dedicated-{name.replace(' ', '-')}-{seed}":
                plans(*row, only=(name,)) for name in MAIN for seed in SEEDS}
    return {f"coa__{task}-{method}-{seed}": plans(*row) for seed in SEEDS}


@pytest.mark.parametrize(("loss", "right", "verdict"), [
    (0.1, 60, REPRODUCED), (0.1, 36, REFUTED), (4.0, 60, REFUTED), (5, 0, REFUTED)])
def test_p1(tmp_path, loss, right, verdict):
    made = judge("P1", tmp_path, **{"coa__sensors-base": plans(4.0)},
                 **made_by("sensors", "coa", loss, right))
    assert made["verdict"] == verdict
    assert made["value"] == (100 if right == 60 else 0)


def test_p1_is_corrected_where_some_plans_are_broken(tmp_path):
    some = {name: plans(0.1, 60)["plans"][name] for name in MAIN}
    del some["greedy 2.5"]["score"]  # its loss was hopeless
    made = judge("P1", tmp_path, **{"coa__sensors-base": plans(4.0)},
                 **{f"coa__sensors-coa-{seed}": {"plans": some, "losses": [1.0]}
                    for seed in SEEDS})
    assert made["verdict"] == CORRECTED and "of use at 5 of 6 main plans" in made["finding"]


def test_p1_is_no_more_than_corrected_where_one_plan_is_hopeless(tmp_path):
    """One of all, in one seed; the claim says any."""
    files = made_by("sensors", "coa", 0.1, 60) | {"coa__sensors-base": plans(40.0)}
    files["coa__sensors-coa-1"]["plans"]["random 6"]["loss"] = 23.0
    made = judge("P1", tmp_path, **files)
    assert made["verdict"] == CORRECTED and "at worst 23.0 nats (random 6 bits)" in made["finding"]


def test_p1_says_what_more_steps_give_when_all_seeds_have_them(tmp_path):
    """The verdict stays with the steps that both tasks have."""
    files = made_by("sensors", "coa", 0.1, 36) | {"coa__sensors-base": plans(4.0)}
    longer = made_by("sensors", "long", 0.1, 60)
    for row in longer.values():
        row["losses"] = [1.0] * 260
    assert "260" not in judge("P1", tmp_path, **files, **dict([*longer.items()][:2]))["finding"]
    made = judge("P1", tmp_path, **longer)
    assert made["verdict"] == REFUTED
    assert "sensors, after 260 steps: of use at 6 of 6" in made["finding"]


@pytest.mark.parametrize(("loss", "right", "verdict"), [
    (0.1, 40, REPRODUCED), (0.1, 10, CORRECTED), (0.4, 40, CORRECTED), (0.4, 10, REFUTED),
    (0.05, 60, REPRODUCED), (0.112, 40, CORRECTED)])
def test_p2(tmp_path, loss, right, verdict):
    made = judge("P2", tmp_path, **made_by("sensors", "coa", loss, right),
                 **made_by("sensors", "dedicated", 0.1, 40))
    assert made["verdict"] == verdict and made["value"] == pytest.approx(loss / 0.1)


def test_p2_says_what_more_steps_give(tmp_path):
    """The verdict stays with the same steps."""
    files = {name: row | {"losses": [1.0] * 100}
             for name, row in made_by("sensors", "coa", 0.4, 10).items()}
    files["coa__sensors-long-0"] = plans(0.1, 40) | {"losses": [1.0] * 260}
    made = judge("P2", tmp_path, **files, **made_by("sensors", "dedicated", 0.1, 40))
    assert made["verdict"] == REFUTED and made["value"] == pytest.approx(4)
    assert "in 2.6 times the steps (1 of 3 seeds) sensors: 1.00 [1.00, 1.00]" in made["finding"]


def test_p2_has_no_verdict_before_all_seeds(tmp_path):
    files = made_by("sensors", "dedicated", 0.1, 40)
    last = f"coa__sensors-dedicated-{MAIN[0].replace(' ', '-')}-2"
    some = {name: row for name, row in files.items() if name != last}
    made = judge("P2", tmp_path, **made_by("sensors", "coa", 0.4, 10), **some)
    assert made["verdict"] == NOT_YET
    assert made["finding"] == f"Still to be made: {last.replace('__', '/')}."
    assert judge("P2", tmp_path, **files)["verdict"] == REFUTED
    # The films' are judged when theirs are whole, too.
    films = made_by("movies", "coa", 0.1) | made_by("movies", "dedicated", 0.1)
    last = last.replace("sensors", "movies")
    made = judge("P2", tmp_path, **{name: row for name, row in films.items() if name != last})
    assert made["verdict"] == REFUTED and "movies:" not in made["finding"]
    assert judge("P2", tmp_path, **films)["verdict"] == CORRECTED


def test_p2_waits_while_files_of_two_runs_are_mixed(tmp_path):
    made = judge("P2", tmp_path, **made_by("sensors", "coa", 0.1, 40, "new"),
                 **made_by("sensors", "dedicated", 0.1, 40, "old"))
    assert made["verdict"] == NOT_YET and "run them again" in made["finding"]


def test_joint_runs_over_different_plans_are_not_compared(tmp_path):
    files = made_by("sensors", "coa", 0.05) | made_by("sensors", "lora", 0.1)
    files["coa__sensors-lora-1"] = plans(0.1) | {"training_plans": "old"}
    made = judge("P5", tmp_path, **files)
    assert made["verdict"] == NOT_YET and "trained over different plans" in made["finding"]


@pytest.mark.parametrize(("late", "train", "verdict"), [
    ([-0.1, 0.01], 1000, REPRODUCED), ([-0.1, 0.01], 10, CORRECTED),
    ([-0.1, 0.1], 1000, CORRECTED), ([0.1, 0.2], 1000, CORRECTED),
    ([0.1, 0.2], 10, REFUTED)])
def test_p3(tmp_path, late, train, verdict):
    row = {"new_configuration_s": 1.0, "new_configuration_s_spread": [0.9, 1.1],
           "materialise_s": 0.1, "materialise_s_spread": [0.1, 0.1],
           "latency_overhead": 0.15, "latency_overhead_spread": late,
           "step_ratio": 1.05, "step_ratio_spread": [1.0, 1.1]}
    made = judge("P3", tmp_path, switching=row, lora=run(1, seconds=train))
    assert (made["verdict"], made["value"]) == (verdict, 1.1)


def searched(**gains: float) -> dict[str, Any]:
    return {f"search__{method}-{seed}": {
        "without_search": 30.0, "start": 36, "hypervolumes": [0] * 61, "reference": [8.6, 9.9],
        "hypervolume": 30.0 + gain * (1 + 0.01 * seed)}
        for method, gain in gains.items() for seed in paper.SEARCHES}


@pytest.mark.parametrize(("ours", "random", "nsga2", "verdict"), [
    (3, 1, 2, REPRODUCED), (2, 1, 2, CORRECTED), (1, 2, 0.5, REFUTED), (0, 0, 0, REFUTED)])
def test_p4(tmp_path, ours, random, nsga2, verdict):
    made = judge("P4", tmp_path, **searched(ours=ours, random=random, nsga2=nsga2))
    assert made["verdict"] == verdict


def test_p4_pairs_nothing(tmp_path):
    """A seed draws other things in another method: its number says nothing."""
    files = searched(ours=3, random=1, nsga2=2)
    before = judge("P4", tmp_path, **files)
    seeds = [*paper.SEARCHES]
    turned = {f"search__random-{a}": files[f"search__random-{b}"]
              for a, b in zip(seeds, seeds[::-1], strict=True)}
    assert judge("P4", tmp_path, **turned)["interval"] == before["interval"]


def test_p4_compares_only_searches_from_one_start(tmp_path):
    files = searched(ours=3, random=1, nsga2=2)
    files["search__random-1"] = files["search__random-1"] | {"without_search": 29.0}
    assert judge("P4", tmp_path, **files)["verdict"] == NOT_YET


@pytest.mark.parametrize(("loss", "right", "verdict"), [
    (0.05, 40, REPRODUCED), (0.1, 60, REPRODUCED), (0.1, 40, CORRECTED), (0.05, 10, CORRECTED),
    (0.4, 40, REFUTED)])
def test_p5(tmp_path, loss, right, verdict):
    made = judge("P5", tmp_path, **made_by("sensors", "coa", loss, right),
                 **made_by("sensors", "lora", 0.1, 40))
    assert made["verdict"] == verdict and "movies" in made["finding"].partition("not run")[2]


def test_p5_looks_apart_at_random_plans_of_few_bits(tmp_path):
    """They are where the two ways differ most."""
    files = {}
    for method, loss, broken in (("coa", 0.1, 0.2), ("lora", 0.1, 3.0)):
        for seed in SEEDS:
            files[f"coa__sensors-{method}-{seed}"] = made = plans(loss)
            made["plans"] |= plans(broken, only=("more random 2.93",))["plans"]
    made = judge("P5", tmp_path, **files)["finding"]
    assert "sensors: 0.68 " in made
    assert "1.00 [1.00, 1.00] without random plans below 4 bits (1 of them)" in made


def test_tasks_that_differ_correct_a_claim(tmp_path):
    files = made_by("sensors", "coa", 0.05) | made_by("sensors", "lora", 0.1)
    alone = judge("P5", tmp_path, **files)
    both = judge("P5", tmp_path, **made_by("movies", "coa", 0.4), **made_by("movies", "lora", 0.1))
    assert (alone["verdict"], both["verdict"]) == (REPRODUCED, CORRECTED)
    assert len(both["evidence"]) == 12
    later = both["finding"].partition("not run: ")[2].rstrip(".").split(", ")
    assert all("long-" in name or name == "..." for name in later)


def test_p5_says_what_more_steps_of_both_give(tmp_path):
    files = made_by("movies", "coa", 0.1) | made_by("movies", "lora", 0.1)
    files |= made_by("sensors", "coa", 0.1) | made_by("sensors", "lora", 0.1)
    assert "lora-long" in judge("P5", tmp_path, **files)["finding"].partition("not run")[2]
    for task, loss in (("sensors", 0.02), ("movies", 0.04)):
        for method, its in (("long", loss), ("lora-long", 0.08)):
            files |= {name: row | {"losses": [1.0] * 260}
                      for name, row in made_by(task, method, its).items()}
    made = judge("P5", tmp_path, **files)["finding"]
    assert "; both in 2.6 times the steps (3 of 3 seeds) sensors: 0.25 " in made
    assert "; both in 2.6 times the steps (3 of 3 seeds) movies: 0.50 " in made
    assert made.count("(loss 0.25 at the m") == made.count("(loss 0.50 at the median plan") == 1
    assert made.count("0.50 [0.50, 0.50] with the plans held fixed") == 1
    assert "not run" not in made
    files["coa__movies-lora-long-1"] |= {"training_plans": "old"}
    assert judge("P5", tmp_path, **files)["verdict"] == NOT_YET


def test_a_piece_of_an_earlier_version_is_asked_for_again(tmp_path):
    """The ledger and the other claims go on."""
    made = judge("T5", tmp_path, targets_speed={}, lora=run(1), targets_minimal=run(1),
                 targets_standard=run(1))
    assert made["verdict"] == NOT_YET and made["value"] is None
    assert made["finding"] == "A stored piece lacks 'aggressive_step_ratio': make it again."


def test_every_rule_waits_when_nothing_is_stored(tmp_path):
    for one in RULES.values():
        made = ledger.entry(one, Stored(tmp_path))
        assert (made["verdict"], made["value"], made["evidence"]) == (NOT_YET, None, [])


def test_numbers_are_rounded_and_names_shortened():
    assert ledger.rounded(0.123456) == 0.1235 and ledger.rounded(16_777_216) == 16_777_216
    assert ledger.listed(list("abc")) == "a, b, c"
    assert ledger.listed(list("abcdefgh")) == "a, b, ..., h"
