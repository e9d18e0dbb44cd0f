"""Paired comparisons of stored results."""

import json
import math
from pathlib import Path

import pytest
import torch

from lib.compare import MAIN, compare_losses, compare_scores, rows
from lib.errors import UserError


def put(folder: Path, name: str, plans: dict[str, dict]) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"result": {"plans": plans}}))


def row(losses: list[float], hits: str = "", plan: str = "p") -> dict:
    score = {"score": {"share": hits.count("1") / len(hits), "hits": hits}} if hits else {}
    return {"plan": plan, "losses": losses} | score


def test_losses_are_compared_as_ratios(tmp_path: Path) -> None:
    for seed in range(3):
        put(tmp_path, f"t-coa-{seed}", {"a": row([0.1, 0.2]), "b": row([10.0, 10.0])})
        put(tmp_path, f"t-lora-{seed}", {"a": row([0.2, 0.4]), "b": row([5.0, 5.0])})
    whole = compare_losses("t", "coa", "lora", ["a", "b"], tmp_path)
    # Half and double: neither is better. Student's t of two plans is 12.7.
    assert whole.value == pytest.approx(1) and whole.low == pytest.approx(2 ** -12.706, rel=1e-3)
    assert whole.high == pytest.approx(1 / whole.low) and (whole.seeds, whole.plans) == (3, 2)
    only = compare_losses("t", "coa", "lora", ["a"], tmp_path)
    assert (only.low, only.value, only.high) == pytest.approx((0.5, 0.5, 0.5))
    assert "3 seeds, 1 plans" in str(only)


def test_only_common_seeds_count_and_one_plan_s_adapters_are_found(tmp_path: Path) -> None:
    for seed in (0, 1):
        put(tmp_path, f"t-coa-{seed}", {"greedy 3": row([0.1 * (seed + 1)] * 10)})
    put(tmp_path, "t-dedicated-greedy-3-1", {"greedy 3": row([0.1] * 10)})
    put(tmp_path, "t-dedicated-greedy-3.5-0", {"greedy 3.5": row([0.1] * 10)})
    assert {*rows("t", "dedicated", "greedy 3", tmp_path)} == {1}
    found = compare_losses("t", "coa", "dedicated", ["greedy 3"], tmp_path)
    assert found.seeds == 1 and math.isclose(found.value, 2)
    assert compare_losses("t", "coa", "dedicated", ["greedy 4"], tmp_path) is None
    assert compare_losses("t", "coa", "dedicated", MAIN, tmp_path) is None


def test_different_plans_are_not_compared(tmp_path: Path) -> None:
    put(tmp_path, "t-coa-0", {"a": row([1.0])})
    put(tmp_path, "t-lora-0", {"a": row([1.0], plan="other")})
    with pytest.raises(UserError, match="different plans"):
        compare_losses("t", "coa", "lora", ["a"], tmp_path)


def test_scores_count_between_floor_and_ceiling(tmp_path: Path) -> None:
    put(tmp_path, "t-coa-0", {"a": row([1.0], "1110"), "b": row([1.0], "1111"),
                              "c": row([1.0]), "d": row([1.0], "0111")})
    put(tmp_path, "t-lora-0", {"a": row([1.0], "1000"), "b": row([1.0], "1111"),
                               "c": row([1.0], "0110"), "d": row([1.0], "0111")})
    found = compare_scores("t", "coa", "lora", ["a", "b", "c", "d"], tmp_path)
    assert found.plans == 3  # b is at the ceiling; in c the first has nothing right
    assert found.value == pytest.approx(0, abs=1e-9) and found.low < 0 < found.high
    # All against nothing is no ceiling.
    put(tmp_path, "t-coa-0", {"e": row([0.1], "1111"), "f": row([9.0])})
    put(tmp_path, "t-lora-0", {"e": row([0.1], "0000"), "f": row([9.0])})
    assert compare_scores("t", "coa", "lora", ["e", "f"], tmp_path).value == pytest.approx(100)
    assert compare_scores("t", "coa", "lora", ["b"], tmp_path) is None
    assert torch.isfinite(torch.tensor([found.low, found.high])).all()


def test_the_bare_base_has_no_seed(tmp_path: Path) -> None:
    assert rows("t", "base", "greedy 3", tmp_path) == {}
    put(tmp_path, "t-base", {"greedy 3": row([0.1] * 10)})
    assert rows("t", "base", "greedy 3", tmp_path) == {0: row([0.1] * 10)}
    assert rows("t", "base", "greedy 4", tmp_path) == {}
