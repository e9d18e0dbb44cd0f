"""Paired comparisons of stored results."""

import json
import math
from pathlib import Path

import pytest

from data.evidence.compare import MAIN, compare_losses, compare_scores, rows
from lib.errors import UserError


def put(folder: Path, name: str, measured: dict[str, dict]) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"result": {"plans": measured}}))


def row(losses: list[float], hits: str = "", digest: str = "p") -> dict:
    score = {"score": {"share": hits.count("1") / len(hits), "hits": hits}} if hits else {}
    return {"plan": digest, "losses": losses} | score


def test_losses_are_compared_as_ratios(tmp_path: Path) -> None:
    for seed in range(3):
        put(tmp_path, f"t-coa-{seed}", {"a": row([0.1, 0.2]), "b": row([10.0, 10.0])})
        put(tmp_path, f"t-lora-{seed}", {"a": row([0.2, 0.4]), "b": row([5.0, 5.0])})
    both = compare_losses("t", "coa", "lora", ["a", "b"], tmp_path)
    # Half and double: neither is better. Student's t of two configurations is 12.7.
    assert both.value == pytest.approx(1) and both.low == pytest.approx(2 ** -12.706, rel=1e-3)
    assert both.high == pytest.approx(1 / both.low) and (both.seeds, both.configurations) == (3, 2)
    one = compare_losses("t", "coa", "lora", ["a"], tmp_path)
    assert (one.low, one.value, one.high) == pytest.approx((0.5, 0.5, 0.5))


def test_only_common_seeds_and_equal_configurations_are_compared(tmp_path: Path) -> None:
    for seed in (0, 1):
        put(tmp_path, f"t-coa-{seed}", {"greedy 3": row([0.1 * (seed + 1)] * 10)})
    put(tmp_path, "t-dedicated-greedy-3-1", {"greedy 3": row([0.1] * 10)})
    put(tmp_path, "t-dedicated-greedy-3.5-0", {"greedy 3.5": row([0.1] * 10)})
    assert {*rows("t", "dedicated", "greedy 3", tmp_path)} == {1}
    ratio = compare_losses("t", "coa", "dedicated", ["greedy 3"], tmp_path)
    assert ratio.seeds == 1 and math.isclose(ratio.value, 2)
    assert compare_losses("t", "coa", "dedicated", MAIN, tmp_path) is None
    put(tmp_path, "t-lora-0", {"greedy 3": row([1.0], digest="other")})
    with pytest.raises(UserError, match="different configurations"):
        compare_losses("t", "coa", "lora", ["greedy 3"], tmp_path)
    assert rows("t", "base", "greedy 3", tmp_path) == {}
    put(tmp_path, "t-base", {"greedy 3": row([0.1])})  # it has no seed
    assert rows("t", "base", "greedy 3", tmp_path) == {0: row([0.1])}


def test_scores_count_between_floor_and_ceiling(tmp_path: Path) -> None:
    put(tmp_path, "t-coa-0", {"a": row([1.0], "1110"), "b": row([1.0], "1111"), "c": row([1.0]),
                              "d": row([1.0], "0111"), "e": row([0.1], "1111")})
    put(tmp_path, "t-lora-0", {"a": row([1.0], "1000"), "b": row([1.0], "1111"),
                               "c": row([1.0], "0110"), "d": row([1.0], "0111"),
                               "e": row([0.1], "0000")})
    gap = compare_scores("t", "coa", "lora", ["a", "b", "c", "d"], tmp_path)
    assert gap.configurations == 3  # b is at the ceiling; in c the first has nothing right
    assert gap.value == pytest.approx(0, abs=1e-9) and gap.low < 0 < gap.high
    assert compare_scores("t", "coa", "lora", ["e"], tmp_path).value == pytest.approx(100)
    assert compare_scores("t", "coa", "lora", ["b"], tmp_path) is None
